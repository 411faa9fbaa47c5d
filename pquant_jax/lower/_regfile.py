"""Verilog of a register file in front of a netlist's weight ports.  numpy only.

A bit is one flip-flop, or three with a majority vote if it is protected; protected bits take the vote back in at every
clock edge, so that a flipped copy lasts one cycle and errors don't add up.  Each copy is a module of its own that keeps its
hierarchy, because synthesis merges equal flip-flops.  `PQUANT_INJECT` adds the ports `flip, flip_bit, flip_copy`: while
`flip` is high, every clock edge stores the inverse in copy `flip_copy` of bit `flip_bit`, as a particle would.
"""

from __future__ import annotations

from typing import Final, NamedTuple

import numpy as np

MODULE: Final = "pq_register_file"
INJECT: Final = "PQUANT_INJECT"

REGISTER_FILE: Final = r"""`timescale 1ns / 1ps

// WORDS words of WORD bits.  USED: bits that exist, others read as 0.  VOTED: those with three flip-flops.
module pq_register_file #(
    parameter integer WORD = 8,
    parameter integer WORDS = 1,
    parameter integer ADDR = 1,
    parameter [WORD*WORDS-1:0] RESET = 0,
    parameter [WORD*WORDS-1:0] USED = 0,
    parameter [WORD*WORDS-1:0] VOTED = 0
) (
    input clk,
    input rst,
    input we,
    input [ADDR-1:0] addr,
    input [WORD-1:0] wdata,
`ifdef PQUANT_INJECT
    input flip,
    input [31:0] flip_bit,
    input [1:0] flip_copy,
`endif
    output [WORD*WORDS-1:0] stored
);
    wire [WORD*WORDS-1:0] next;
    genvar n;
    generate
        for (n = 0; n < WORDS; n = n + 1) begin : words_next
            assign next[n*WORD +: WORD] = rst ? RESET[n*WORD +: WORD] : (we && addr == n) ? wdata : stored[n*WORD +: WORD];
        end
        for (n = 0; n < WORD * WORDS; n = n + 1) begin : flop
`ifdef PQUANT_INJECT
            wire hit = flip && flip_bit == n;
            wire [2:0] upset = {hit && flip_copy == 2, hit && flip_copy == 1, hit && flip_copy == 0};
`else
            wire [2:0] upset = 3'b000;
`endif
            if (!USED[n]) begin : none
                assign stored[n] = 1'b0;
            end else if (VOTED[n]) begin : three
                wire [2:0] q;
                pq_copy #(.RESET(RESET[n])) copy0 (.clk(clk), .d(next[n] ^ upset[0]), .q(q[0]));
                pq_copy #(.RESET(RESET[n])) copy1 (.clk(clk), .d(next[n] ^ upset[1]), .q(q[1]));
                pq_copy #(.RESET(RESET[n])) copy2 (.clk(clk), .d(next[n] ^ upset[2]), .q(q[2]));
                assign stored[n] = (q[0] & q[1]) | (q[0] & q[2]) | (q[1] & q[2]);
            end else begin : one
                reg q = RESET[n];
                always @(posedge clk) q <= next[n] ^ upset[0];
                assign stored[n] = q;
            end
        end
    endgenerate
endmodule

// One of three equal flip-flops.  A module of its own: an attribute on the register alone does not keep Yosys from merging.
(* keep_hierarchy = "yes" *)
module pq_copy #(parameter RESET = 1'b0) (input clk, input d, output q);
    (* dont_touch = "true" *) (* keep = "true" *) reg state = RESET;
    always @(posedge clk) state <= d;
    assign q = state;
endmodule
"""

_TOP: Final = r"""`timescale 1ns / 1ps

// The netlist `{net}` with its weights in {words} registers of {word} bits; see regmap.json.
// At power-up, and after rst (synchronous), they hold the weights that the design was made with.
module {top} (
    input clk,
    input rst,
    input we,
    input [{addr_high}:0] addr,
    input [{word_high}:0] wdata,
    output [{word_high}:0] rdata,
`ifdef PQUANT_INJECT
    input flip,
    input [31:0] flip_bit,
    input [1:0] flip_copy,
`endif
{data_port}    output [{out_high}:0] model_out
);
    wire [{stored_high}:0] stored;
    wire [{weight_high}:0] weights;

    pq_register_file #(
        .WORD({word}),
        .WORDS({words}),
        .ADDR({addr}),
        .RESET({reset}),
        .USED({used}),
        .VOTED({voted})
    ) registers (
        .clk(clk),
        .rst(rst),
        .we(we),
        .addr(addr),
        .wdata(wdata),
`ifdef PQUANT_INJECT
        .flip(flip),
        .flip_bit(flip_bit),
        .flip_copy(flip_copy),
`endif
        .stored(stored)
    );

    assign rdata = addr < {words} ? stored[addr*{word} +: {word}] : {word}'d0;
{fields}
    {net} net (
{clock}        .model_inp({inputs}),
        .model_out(model_out)
    );
endmodule
"""


class Layout(NamedTuple):
    """Sizes in bits and words of a top module; fields: (bit of the store, bits) of every weight, in the order of the ports."""

    top: str
    net: str
    word: int
    words: int
    data_bits: int
    out_bits: int
    clocked: bool
    fields: tuple[tuple[int, int], ...]


def address_bits(words: int) -> int:
    """Bits of an address; at least one."""
    return max((words - 1).bit_length(), 1)


def top_verilog(layout: Layout, reset: np.ndarray, used: np.ndarray, voted: np.ndarray) -> str:
    """The top module.  reset, used, voted: bool (word * words,), lowest bit first."""
    total, addr = layout.word * layout.words, address_bits(layout.words)
    return _TOP.format(
        top=layout.top, net=layout.net, word=layout.word, words=layout.words, addr=addr,
        addr_high=addr - 1, word_high=layout.word - 1, out_high=layout.out_bits - 1, stored_high=total - 1,
        weight_high=sum(bits for _, bits in layout.fields) - 1,
        data_port=f"    input [{layout.data_bits - 1}:0] model_inp,\n" if layout.data_bits else "",
        inputs="{weights, model_inp}" if layout.data_bits else "weights",
        reset=literal(reset), used=literal(used), voted=literal(voted), fields=_wires(layout),
        clock="        .clk(clk),\n" if layout.clocked else "",
    )  # fmt: skip


def _wires(layout: Layout) -> str:
    """One line per run of weights that lie side by side in the store: a packed store is one line."""
    lines: list[str] = []
    begin = low = length = 0
    for bit, bits in (*layout.fields, (-1, 0)):
        if bit != begin + length and length:
            lines.append(f"    assign weights[{low} +: {length}] = stored[{begin} +: {length}];")
            low, length = low + length, 0
        if not length:
            begin = bit
        length += bits
    return "\n".join(lines) + "\n"


def literal(bits: np.ndarray) -> str:
    """A Verilog number of these bits, lowest first.

    >>> literal(np.array([1, 0, 1, 1, 0, 1], bool))
    "6'h2d"
    """
    value = int.from_bytes(np.packbits(np.asarray(bits, bool), bitorder="little").tobytes(), "little")
    return f"{len(bits)}'h{value:x}"
