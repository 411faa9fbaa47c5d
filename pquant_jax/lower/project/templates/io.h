/* Formats of the ports of @name@ and conversion between numbers and the bits of a port.  C99 and C++, header only, needs
 * <math.h> (link with -lm).
 *
 * A port is an array of 32-bit words: bit b of the port is bit b % 32 of word b / 32, element 0 lies in the lowest bits.
 * On a little-endian machine the words in memory are the bytes of the port, lowest first.  Bits above the port are 0.
 * An element of width w, fraction f is the integer code, two's complement if it is signed, and stands for
 * code * 2^-f.  What does not fit is wrapped as the hardware does: rounded down to the grid, then modulo 2^w.
 * An element of width 0 has no bits: it is ignored on the input, and 0 on the output.
 */
#ifndef @NAME@_IO_H
#define @NAME@_IO_H

#include <math.h>
#include <stdint.h>
#include <string.h>

#define @NAME@_LATENCY @latency@ /* clock edges from a vector on the input to its result; 0: combinational */
#define @NAME@_II @ii@ /* clock cycles between two vectors */
#define @NAME@_INPUTS @inputs@ /* elements of model_inp */
#define @NAME@_INPUT_BITS @in_bits@
#define @NAME@_INPUT_WORDS @in_words@ /* 32-bit words that hold them */
#define @NAME@_OUTPUTS @outputs@ /* elements of model_out */
#define @NAME@_OUTPUT_BITS @out_bits@
#define @NAME@_OUTPUT_WORDS @out_words@

@ports@
/* where an element lies in its port and what its integer means */
typedef struct {
    uint32_t offset;
    int16_t fraction;
    uint8_t width;
    uint8_t is_signed;
} @name@_element;

static const @name@_element @name@_input[@NAME@_INPUTS] = {
@input_rows@
};

static const @name@_element @name@_output[@NAME@_OUTPUTS] = {
@output_rows@
};

/* the low bits of a code into the words */
static inline void @name@_put(uint32_t *words, @name@_element e, uint64_t code) {
    uint32_t n;
    for (n = 0; n < e.width; ++n) {
        uint32_t bit = e.offset + n;
        words[bit / 32] |= (uint32_t)((code >> n) & 1u) << (bit % 32);
    }
}

static inline int64_t @name@_get(const uint32_t *words, @name@_element e) {
    uint64_t code = 0, sign;
    uint32_t n;
    if (e.width == 0) return 0;
    for (n = 0; n < e.width; ++n) {
        uint32_t bit = e.offset + n;
        code |= (uint64_t)((words[bit / 32] >> (bit % 32)) & 1u) << n;
    }
    sign = e.is_signed ? (uint64_t)1 << (e.width - 1) : 0;
    return (int64_t)(code & ~sign) - (int64_t)(code & sign);
}

/* the code of a finite number: rounded down to the grid, wrapped */
static inline uint64_t @name@_code(@name@_element e, double x) {
    return (uint64_t)(int64_t)fmod(floor(ldexp(x, e.fraction)), ldexp(1.0, e.width));
}

@functions@
#endif
