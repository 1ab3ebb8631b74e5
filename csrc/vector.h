// Vectors of floats on the compiler's vector extensions: one source for every instruction set. Included by the
// kernels' .inl files only, inside a namespace that each instruction set has to itself; everything is static, so that
// nothing compiled for a newer machine can be linked into what an older one runs.

#if defined(__AVX512F__)
constexpr int width = 16;
#elif defined(__AVX2__)
constexpr int width = 8;
#else
constexpr int width = 4;
#endif

typedef float Vec __attribute__((vector_size(4 * width)));
typedef uint32_t Bits __attribute__((vector_size(4 * width)));

// Two vectors: what one load of 2 * width channels gives.
struct Pair {
  Vec a, b;
};

struct BFloat16 {
  uint16_t bits;
};

template <class T>
static inline T load_raw(const void* p) {
  T value;
  __builtin_memcpy(&value, p, sizeof(T));
  return value;
}

template <class T>
static inline void store_raw(void* p, T value) {
  __builtin_memcpy(p, &value, sizeof(T));
}

static inline Vec broadcast(float value) { return Vec{} + value; }

static inline Pair zeros() { return {Vec{}, Vec{}}; }

// Vectors in lane order: statistics, parameters, folded gradients.
static inline Pair load_lanes(const float* p) { return {load_raw<Vec>(p), load_raw<Vec>(p + width)}; }

static inline void store_lanes(float* p, Pair v) {
  store_raw(p, v.a);
  store_raw(p + width, v.b);
}

// float32 in memory is in lane order already.
static inline Pair load(const float* p) { return load_lanes(p); }

static inline void store(float* p, Pair v) { store_lanes(p, v); }

// The larger of two vectors, `b` where either is a NaN. Compilers do not see that this is one instruction.
static inline Vec maximum(Vec a, Vec b) {
#if defined(__AVX512F__)
  return (Vec)_mm512_max_ps((__m512)a, (__m512)b);
#elif defined(__AVX2__)
  return (Vec)_mm256_max_ps((__m256)a, (__m256)b);
#else
  return a > b ? a : b;
#endif
}

static inline Vec as_float(Bits bits) { return (Vec)bits; }

// bfloat16 bits in the upper half of each lane, rounded to nearest even. A NaN keeps its sign and stays one, because
// the numbers that meet here carry zeros in the lower half of a NaN (the driver sees to the parameters).
static inline Bits round_bfloat16(Vec v) {
  const Bits bits = (Bits)v;
  return bits + ((bits >> 16) & 1u) + 0x7fffu;
}

#if defined(CYCLEGAN_AVX512_BF16)
// One instruction converts 32 numbers in order, so nothing is interleaved.
constexpr bool interleaved_bfloat16 = false;

typedef uint16_t HalfBits __attribute__((vector_size(2 * width)));

static inline Pair load(const BFloat16* p) {
  const Bits a = __builtin_convertvector(load_raw<HalfBits>(p), Bits);
  const Bits b = __builtin_convertvector(load_raw<HalfBits>(p + width), Bits);
  return {as_float(a << 16), as_float(b << 16)};
}

static inline void store(BFloat16* p, Pair v) { store_raw(p, (__m512i)_mm512_cvtne2ps_pbh((__m512)v.b, (__m512)v.a)); }
#else
// A 32-bit lane holds two neighbouring channels. Splitting it into the even and the odd one costs a shift and a mask
// and no shuffle; so does putting them together again.
constexpr bool interleaved_bfloat16 = true;

static inline Pair load(const BFloat16* p) {
  const Bits both = load_raw<Bits>(p);
  return {as_float(both << 16), as_float(both & 0xffff0000u)};
}

// The upper halves of two rounded vectors.
static inline void store_upper(BFloat16* p, Bits even, Bits odd) {
#if defined(__AVX2__) && !defined(__AVX512F__)
  store_raw(p, _mm256_blend_epi16((__m256i)(even >> 16), (__m256i)odd, 0xaa));
#else
  store_raw(p, (even >> 16) | (odd & 0xffff0000u));
#endif
}

static inline void store(BFloat16* p, Pair v) { store_upper(p, round_bfloat16(v.a), round_bfloat16(v.b)); }
#endif

// `store` under a name that members called so do not hide.
template <class T>
static inline void store_pair(T* p, Pair v) {
  store(p, v);
}

// What a kernel stores by way of this is rounded to nearest even in the end, for half the price. A number that lies
// just half-way between two of bfloat16 is rare (one in 65536) among those that are computed, so all are rounded as if
// there were none, which takes one addition; where one was met the kernel stores its few pixels again, `exact`.
template <class T, bool exact>
struct Halves {
  inline void store(T* p, Pair v) { store_pair(p, v); }
  inline bool met() const { return false; }
};

#if (defined(__AVX2__) || defined(__AVX512F__)) && !defined(CYCLEGAN_AVX512_BF16)
static inline Bits smaller_words(Bits a, Bits b) {
#if defined(__AVX512F__)
  return (Bits)_mm512_min_epu16((__m512i)a, (__m512i)b);
#else
  return (Bits)_mm256_min_epu16((__m256i)a, (__m256i)b);
#endif
}

template <>
struct Halves<BFloat16, false> {
  // The smallest of the lower halves; zero is what half-way and half make.
  Bits least = Bits{} - 1u;

  inline void store(BFloat16* p, Pair v) {
    const Bits even = (Bits)v.a + 0x8000u, odd = (Bits)v.b + 0x8000u;
    least = smaller_words(least, smaller_words(even, odd));
    store_upper(p, even, odd);
  }

  inline bool met() const {
#if defined(__AVX512F__)
    return (_mm512_testn_epi16_mask((__m512i)least, (__m512i)least) & 0x55555555u) != 0;
#else
    const __m256i zero = _mm256_cmpeq_epi16((__m256i)least, _mm256_setzero_si256());
    return (static_cast<uint32_t>(_mm256_movemask_epi8(zero)) & 0x33333333u) != 0;
#endif
  }
};
#endif

constexpr int group = 2 * width;

// The last, incomplete group of a pixel, with zeros behind it.
template <class T>
static inline Pair load_some(const T* p, int64_t count) {
  T buffer[group] = {};
  __builtin_memcpy(buffer, p, static_cast<size_t>(count) * sizeof(T));
  return load(buffer);
}

template <class T>
static inline void store_some(T* p, Pair v, int64_t count) {
  T buffer[group];
  store(buffer, v);
  __builtin_memcpy(p, buffer, static_cast<size_t>(count) * sizeof(T));
}

// A group that is whole if `Whole`, else `count` channels of one.
template <bool Whole, class T>
static inline Pair load_group(const T* p, int64_t count) {
  if constexpr (Whole) return load(p);
  return load_some(p, count);
}

template <bool Whole, class T>
static inline void store_group(T* p, Pair v, int64_t count) {
  if constexpr (Whole) {
    store(p, v);
  } else {
    store_some(p, v, count);
  }
}

template <bool Whole, class T, bool exact>
static inline void store_group(T* p, Pair v, int64_t count, Halves<T, exact>& halves) {
  if constexpr (Whole) {
    halves.store(p, v);
  } else {
    store_some(p, v, count);
  }
}

// Runs what is seldom needed, out of the way.
template <class Run>
__attribute__((noinline, cold)) static void again(Run run) {
  run();
}
