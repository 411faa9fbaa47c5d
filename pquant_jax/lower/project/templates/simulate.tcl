# The testbench of @name@ in xsim, from any Tcl shell with Vivado's programs on the PATH (`vivado -mode batch -source`,
# `tclsh`):  vivado/simulate.tcl [-tclargs FLAVOR], FLAVOR is @flavors@.  Ends with code 1 unless xsim printed PASS: its
# own exit code does not tell.
set root [file normalize [file join [file dirname [info script]] ..]]
set flavor [expr {[llength $argv] > 0 ? [lindex $argv 0] : "@flavor@"}]
set rtl [file join $root rtl $flavor]
if {![file isdirectory $rtl]} { error "no RTL in $rtl; FLAVOR is one of: @flavors@" }
set work [file join $root build xsim-$flavor]
file mkdir $work
foreach read [concat [glob -nocomplain [file join $rtl memfiles *]] [glob [file join $root vectors *.hex]]] {
  file copy -force $read $work
}
cd $work

set sources {}
if {$flavor eq "vhdl"} {
  foreach source [list @vhdl_sources@] { lappend sources [file join $rtl $source] }
  lappend sources [file join $root sim tb_@name@.vhd]
  exec xvhdl -2008 {*}$sources >@ stdout 2>@ stderr
} else {
  foreach source [list @verilog_sources@] { lappend sources [file join $rtl $source] }
  lappend sources [file join $root sim tb_@name@.sv]
  exec xvlog -sv {*}$sources >@ stdout 2>@ stderr
}
exec xelab tb_@name@ -snapshot tb_@name@ -timescale 1ns/1ps >@ stdout 2>@ stderr
catch {exec xsim tb_@name@ -runall -log simulation.log} printed
puts $printed
if {![regexp -line {^PASS @vectors@ vectors} $printed]} {
  puts "FAIL the testbench of @name@ ($flavor) did not pass"
  exit 1
}
