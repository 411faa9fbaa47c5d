build-verilog: build/verilog/obj/tb_$(NAME)

build/verilog/obj/tb_$(NAME): $(VERILOG) sim/tb_$(NAME).sv
	mkdir -p build/verilog
	$(VERILATOR) --binary --timing -Wall -Wno-fatal $(VERILATOR_FLAGS) --top-module tb_$(NAME) -Mdir build/verilog/obj \
	  -o tb_$(NAME) $(VERILOG) sim/tb_$(NAME).sv > build/verilog/build.log 2>&1; \
	  status=$$?; cat build/verilog/build.log; exit $$status

# the simulation reads vectors and tables from its working directory
sim-verilog: build-verilog
	cp vectors/*.hex $(wildcard rtl/verilog/memfiles/*) build/verilog
	cd build/verilog && { obj/tb_$(NAME) > simulation.log 2>&1; status=$$?; cat simulation.log; exit $$status; }
	grep -q '^PASS $(VECTORS) vectors' build/verilog/simulation.log

