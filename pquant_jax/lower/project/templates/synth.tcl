# Synthesis, placement and routing of @name@ out of context, without a project on disk:
#     vivado -mode batch -source vivado/synth.tcl [-tclargs FLAVOR [PART [STOP]]]
# FLAVOR is @flavors@; PART defaults to @part@; STOP is synth or route.
# Reports go to reports/FLAVOR, checkpoints to build/vivado-FLAVOR, both beside the folder of this script.
set root [file normalize [file join [file dirname [info script]] ..]]
set flavor [expr {[llength $argv] > 0 ? [lindex $argv 0] : "@flavor@"}]
set part [expr {[llength $argv] > 1 ? [lindex $argv 1] : "@part@"}]
set stop [expr {[llength $argv] > 2 ? [lindex $argv 2] : "route"}]
set rtl [file join $root rtl $flavor]
if {![file isdirectory $rtl]} { error "no RTL in $rtl; FLAVOR is one of: @flavors@" }
if {$stop ni {synth route}} { error "STOP is $stop, expected synth or route" }

set work [file join $root build vivado-$flavor]
set reports [file join $root reports $flavor]
file mkdir $work $reports
# VHDL opens its tables relative to the working directory, Verilog looks there too
foreach table [glob -nocomplain [file join $rtl memfiles *]] { file copy -force $table $work }
cd $work

create_project -in_memory -part $part
if {$flavor eq "vhdl"} {
  foreach source [list @vhdl_sources@] { read_vhdl -vhdl2008 [file join $rtl $source] }
} else {
  foreach source [list @verilog_sources@] { read_verilog [file join $rtl $source] }
}
foreach table [glob -nocomplain [file join $work *.mem]] { read_mem $table }
read_xdc -mode out_of_context [file join $root constraints @name@.xdc]

# Operators are small modules: flattened, so that Vivado trims across them.
synth_design -top @name@ -part $part -mode out_of_context -flatten_hierarchy full
write_checkpoint -force post_synth.dcp
report_utilization -file [file join $reports post_synth_utilization.rpt]
report_timing_summary -file [file join $reports post_synth_timing.rpt]
if {$stop eq "route"} {
  opt_design -directive ExploreWithRemap
  place_design
  phys_opt_design
  route_design
  write_checkpoint -force post_route.dcp
  report_utilization -file [file join $reports post_route_utilization.rpt]
  report_timing_summary -file [file join $reports post_route_timing.rpt]
  report_power -file [file join $reports post_route_power.rpt]
  report_drc -file [file join $reports post_route_drc.rpt]
}
puts "reports of @name@ ($flavor, $part) are in $reports"
