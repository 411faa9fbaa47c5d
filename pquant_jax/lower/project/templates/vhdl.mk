build-vhdl: build/vhdl/analysed

build/vhdl/analysed: $(VHDL) sim/tb_$(NAME).vhd
	mkdir -p build/vhdl
	cd build/vhdl && rm -f *.cf && { $(GHDL) -a --std=08 $(VHDL:%=../../%) ../../sim/tb_$(NAME).vhd > build.log 2>&1; \
	  status=$$?; cat build.log; exit $$status; }
	touch $@

# undefined bits at time 0, before the first vector is through, are no fault of the design
sim-vhdl: build-vhdl
	cp vectors/*.hex $(wildcard rtl/vhdl/memfiles/*) build/vhdl
	cd build/vhdl && { $(GHDL) --elab-run --std=08 tb_$(NAME) --ieee-asserts=disable-at-0 > simulation.log 2>&1; \
	  status=$$?; cat simulation.log; exit $$status; }
	grep -q '^PASS $(VECTORS) vectors' build/vhdl/simulation.log

