# Timing of @name@ on @part@: @mhz@ MHz.  Read out of context by vivado/synth.tcl (ports are not pins, there are no I/O
# buffers); delays at the ports stand for the logic around it.  In a larger design keep the clock of that design instead.
@clock@
set_clock_uncertainty -setup @uncertainty@ [get_clocks clk]
set_input_delay -clock clk -max @delay_max@ [get_ports {model_inp[*]}]
set_input_delay -clock clk -min @delay_min@ [get_ports {model_inp[*]}]
set_output_delay -clock clk -max @delay_max@ [get_ports {model_out[*]}]
set_output_delay -clock clk -min @delay_min@ [get_ports {model_out[*]}]
