/* @PORT@ numbers -> words, and back */
static inline void @name@_pack_@port@(const double *x, uint32_t *words) {
    uint32_t n;
    memset(words, 0, sizeof(uint32_t) * @PORT@_WORDS);
    for (n = 0; n < @PORT@S; ++n) @name@_put(words, @name@_@port@[n], @name@_code(@name@_@port@[n], x[n]));
}

static inline void @name@_unpack_@port@(const uint32_t *words, double *x) {
    uint32_t n;
    for (n = 0; n < @PORT@S; ++n) x[n] = ldexp((double)@name@_get(words, @name@_@port@[n]), -@name@_@port@[n].fraction);
}

/* @PORT@ integer codes -> words, and back */
static inline void @name@_pack_@port@_codes(const int64_t *codes, uint32_t *words) {
    uint32_t n;
    memset(words, 0, sizeof(uint32_t) * @PORT@_WORDS);
    for (n = 0; n < @PORT@S; ++n) @name@_put(words, @name@_@port@[n], (uint64_t)codes[n]);
}

static inline void @name@_unpack_@port@_codes(const uint32_t *words, int64_t *codes) {
    uint32_t n;
    for (n = 0; n < @PORT@S; ++n) codes[n] = @name@_get(words, @name@_@port@[n]);
}

