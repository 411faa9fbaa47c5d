-- Self-checking testbench of @name@: every output vector, integer by integer.  VHDL-2008 as every simulator knows it.
-- Reads inputs.hex, outputs.hex and the netlist's tables from the working directory; each line of the vectors is one
-- vector in hexadecimal, element 0 in the lowest bits.  Prints "PASS <n> vectors", or the first mismatches and stops
-- with severity failure.
library ieee;
use ieee.std_logic_1164.all;
use ieee.numeric_std.all;
use ieee.std_logic_textio.all;
use std.textio.all;

entity tb_@name@ is
end entity tb_@name@;

architecture bench of tb_@name@ is
  constant VECTORS : natural := @vectors@;
  constant LATENCY : natural := @latency@;  -- clock edges between a vector on the input and its result; 0: combinational
  constant DELAY : natural := @delay@;
  constant SHOWN : natural := 10;  -- mismatching elements that are printed
  constant HALF : time := @half_ps@ ps;  -- half a clock period

@clock_declaration@
  signal model_inp : std_logic_vector(@in_high@ downto 0) := (others => '0');
  signal model_out : std_logic_vector(@out_high@ downto 0);

  -- Decimal digits of any number of bits; the bits themselves if one of them is neither 0 nor 1.
  function decimal(bits : std_logic_vector; negative : boolean) return string is
    variable rest : unsigned(bits'length - 1 downto 0) := unsigned(bits);
    variable digits : string(1 to bits'length + 1);
    variable first : natural := digits'high + 1;
    variable remainder : natural range 0 to 19;
    variable below : boolean := false;
  begin
    for j in rest'range loop
      if rest(j) /= '0' and rest(j) /= '1' then
        for n in rest'range loop
          digits(rest'length - n) := std_logic'image(rest(n))(2);
        end loop;
        return digits(1 to rest'length);
      end if;
    end loop;
    below := negative and rest(rest'high) = '1';
    if below then
      rest := not rest + 1;
    end if;
    loop
      remainder := 0;
      for j in rest'range loop  -- schoolbook division by ten, bit by bit
        remainder := 2 * remainder;
        if rest(j) = '1' then
          remainder := remainder + 1;
        end if;
        rest(j) := '0';
        if remainder >= 10 then
          remainder := remainder - 10;
          rest(j) := '1';
        end if;
      end loop;
      first := first - 1;
      digits(first) := character'val(character'pos('0') + remainder);
      exit when rest = 0;
    end loop;
    if below then
      first := first - 1;
      digits(first) := '-';
    end if;
    return digits(first to digits'high);
  end function decimal;

  procedure say(text : string) is
    variable row : line;
  begin
    write(row, text);
    writeline(output, row);
  end procedure say;

  procedure check_table(name : string; lines : natural) is
    file table : text open read_mode is name;
    variable row : line;
    variable count : natural := 0;
  begin
    while not endfile(table) loop
      readline(table, row);
      count := count + 1;
    end loop;
    assert count = lines
      report "FAIL the table " & name & " has " & integer'image(count) & " lines, expected " & integer'image(lines)
      severity failure;
  end procedure check_table;
begin
  dut : entity work.@name@ port map (@clock_port@model_inp => model_inp, model_out => model_out);

  test : process
    file inputs : text open read_mode is "inputs.hex";
    file outputs : text open read_mode is "outputs.hex";
    variable given : std_logic_vector(@in_digits@ * 4 - 1 downto 0);
    variable wanted : std_logic_vector(@out_digits@ * 4 - 1 downto 0);
    variable got, want : std_logic_vector(@out_high@ downto 0);
    variable vector, wrong, printed : natural := 0;

    procedure take(file hex : text; name : string; number : natural; bits : out std_logic_vector) is
      variable row : line;
      variable good : boolean;
    begin
      good := not endfile(hex);
      if good then
        readline(hex, row);
        hread(row, bits, good);
      end if;
      assert good report "FAIL " & name & " ends before vector " & integer'image(number) severity failure;
    end procedure take;

    procedure check(element : string; high, low : natural; negative : boolean) is
    begin
      if got(high downto low) /= want(high downto low) then
        if printed < SHOWN then
          say("mismatch: vector " & integer'image(vector) & ", " & element & ": expected "
              & decimal(want(high downto low), negative) & ", got " & decimal(got(high downto low), negative));
        end if;
        printed := printed + 1;
      end if;
    end procedure check;
  begin
@table_checks@
    for cycle in 0 to VECTORS + DELAY - 1 loop
      if cycle < VECTORS then
        take(inputs, "inputs.hex", cycle, given);
        model_inp <= given(model_inp'range);
      end if;
@clock_cycle@
      if cycle >= DELAY then
        vector := cycle - DELAY;
        take(outputs, "outputs.hex", vector, wanted);
        got := model_out;
        want := wanted(model_out'range);
        if got /= want then
          wrong := wrong + 1;
@checks@
        end if;
      end if;
    end loop;
    if wrong /= 0 then
      say("FAIL " & integer'image(wrong) & " of " & integer'image(VECTORS) & " vectors differ (latency "
          & integer'image(LATENCY) & ")");
    end if;
    assert wrong = 0 report "outputs differ" severity failure;
    say("PASS " & integer'image(VECTORS) & " vectors");
    wait;
  end process test;
end architecture bench;
