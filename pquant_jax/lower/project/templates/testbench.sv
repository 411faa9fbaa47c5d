// Self-checking testbench of @name@: every output vector, integer by integer.  SystemVerilog, for any simulator.
// Reads inputs.hex, outputs.hex and the netlist's tables from the working directory; each line of the vectors is one
// vector in hexadecimal, element 0 in the lowest bits.  Prints "PASS <n> vectors", or the first mismatches and $fatal.
`timescale 1ns / 1ps

module tb_@name@;
  localparam integer VECTORS = @vectors@;
  localparam integer LATENCY = @latency@;  // clock edges between a vector on the input and its result; 0: combinational
  localparam integer DELAY = @delay@;
  localparam integer SHOWN = 10;  // mismatching elements that are printed
  localparam realtime HALF = @half@;  // half a clock period in ns

  reg [@in_high@:0] model_inp;
  wire [@out_high@:0] model_out;
  reg [@out_high@:0] expected;
@clock_declaration@
  integer inputs, outputs, cycle, vector, wrong, shown, found;

  @name@ dut (@clock_port@.model_inp(model_inp), .model_out(model_out));

  // A missing table is only a warning of $readmemh, so it is looked for here.
  task automatic check_table(input string name, input integer lines);
    integer file, count;
    string line;
    begin
      file = $fopen(name, "r");
      if (file == 0) $fatal(1, "FAIL the table %s can't be read in the working directory", name);
      count = 0;
      while ($fgets(line, file) != 0) if (line != "") count = count + 1;
      $fclose(file);
      if (count != lines) $fatal(1, "FAIL the table %s has %0d lines, expected %0d", name, count, lines);
    end
  endtask

  task automatic check(input string element, input [63:0] got, input [63:0] want);
    if (got !== want) begin
      if (shown < SHOWN) $display("mismatch: vector %0d, %s: expected %0d, got %0d", vector, element, $signed(want), $signed(got));
      shown = shown + 1;
    end
  endtask

  initial begin
@table_checks@
    inputs = $fopen("inputs.hex", "r");
    outputs = $fopen("outputs.hex", "r");
    if (inputs == 0 || outputs == 0) $fatal(1, "FAIL inputs.hex or outputs.hex can't be read in the working directory");
    wrong = 0;
    shown = 0;
    model_inp = 0;
    expected = 0;
    for (cycle = 0; cycle < VECTORS + DELAY; cycle = cycle + 1) begin
      if (cycle < VECTORS) begin
        found = $fscanf(inputs, "%h", model_inp);
        if (found != 1) $fatal(1, "FAIL inputs.hex ends before vector %0d of %0d", cycle, VECTORS);
      end
@clock_cycle@
      if (cycle >= DELAY) begin
        vector = cycle - DELAY;
        found = $fscanf(outputs, "%h", expected);
        if (found != 1) $fatal(1, "FAIL outputs.hex ends before vector %0d of %0d", vector, VECTORS);
        if (model_out !== expected) begin
          wrong = wrong + 1;
@checks@
        end
      end
    end
    $fclose(inputs);
    $fclose(outputs);
    if (wrong != 0) $fatal(1, "FAIL %0d of %0d vectors differ (latency %0d)", wrong, VECTORS, LATENCY);
    $display("PASS %0d vectors", VECTORS);
    $finish;
  end
endmodule
