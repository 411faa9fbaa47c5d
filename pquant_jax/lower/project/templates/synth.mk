# resources with Yosys (UltraScale+); tables become logic, because there is no distributed ROM of any depth
synth:
	mkdir -p build/yosys reports
	for source in $(VERILOG); do \
	  sed 's/(\*[ ]*rom_style[^*]*\*)/(* rom_style = "logic" *)/' $$source > build/yosys/$$(basename $$source); done
	cp $(wildcard rtl/verilog/memfiles/*) synth/yosys.ys build/yosys
	cd build/yosys && $(YOSYS) -q -l yosys.log yosys.ys
	cp build/yosys/stat.json reports/yosys.json
	@echo 'cells of $(NAME) are in reports/yosys.json'

