// Arithmetic and 16-bit storage, for the GPU and for the host. The GPU's part needs no header.
#ifdef __CUDACC__
#define INLINE __device__ __forceinline__
#define DEVICE __device__
#define LAMBDA
#ifndef INFINITY
#define INFINITY __uint_as_float(0x7f800000u)
#define NAN __uint_as_float(0x7fc00000u)
#endif
#else
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#define INLINE static inline __attribute__((always_inline))
#define DEVICE
#define LAMBDA __attribute__((always_inline))
using std::abs; using std::ceil; using std::floor; using std::trunc;
#endif

typedef unsigned char uint8;
typedef unsigned int bits32;
typedef long long int64;

template <int N> struct Constant {
    static constexpr int value = N;
    DEVICE constexpr operator int() const { return N; }
};

// Calls body(Constant<0>()), ..., body(Constant<N - 1>()) without a loop.
template <int N, int I = 0, class Body> INLINE void unroll(Body &&body) {
    if constexpr (I < N) {
        body(Constant<I>());
        unroll<N, I + 1>(body);
    }
}

#ifdef __CUDACC__
INLINE float as_float(bits32 bits) { return __uint_as_float(bits); }
INLINE bits32 as_bits(float value) { return __float_as_uint(value); }
#else
INLINE float as_float(bits32 bits) { float value; memcpy(&value, &bits, 4); return value; }
INLINE bits32 as_bits(float value) { bits32 bits; memcpy(&bits, &value, 4); return bits; }
#endif

// The types in which x and the spikes are stored. Arithmetic never happens in them. Rounding is to nearest even.
struct float16 { unsigned short bits; };
struct bfloat16 { unsigned short bits; };

INLINE float load_(float stored) { return stored; }
INLINE double load_(double stored) { return stored; }
INLINE float load_(bfloat16 stored) { return as_float(bits32(stored.bits) << 16); }
INLINE float load_(float16 stored) {
#ifdef __CUDACC__
    float value;
    asm("cvt.f32.f16 %0, %1;" : "=f"(value) : "h"(stored.bits));
    return value;
#else
    const bits32 magnitude = bits32(stored.bits & 0x7fff) << 13;
    const bits32 special = (stored.bits & 0x7c00) == 0x7c00 ? 0x7f800000u : 0u;
    return as_float(as_bits(as_float(magnitude) * 0x1p112f) | special | bits32(stored.bits & 0x8000) << 16);
#endif
}

INLINE void store_(float value, float &stored) { stored = value; }
INLINE void store_(double value, double &stored) { stored = value; }
INLINE void store_(float value, bfloat16 &stored) {
#if defined(__CUDACC__) && __CUDA_ARCH__ >= 800
    asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(stored.bits) : "f"(value));
#else
    const bits32 bits = as_bits(value);
    const bits32 rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
    stored.bits = (unsigned short)((bits & 0x7fffffff) > 0x7f800000 ? 0x7fc0 : rounded);
#endif
}
INLINE void store_(float value, float16 &stored) {
#ifdef __CUDACC__
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(stored.bits) : "f"(value));
#else
    const bits32 bits = as_bits(value), magnitude = bits & 0x7fffffff;
    const bits32 normal = (magnitude + 0xc8000fffu + ((magnitude >> 13) & 1)) >> 13;
    const bits32 subnormal = as_bits(as_float(magnitude) + 0.5f) - 0x3f000000;
    const bits32 special = magnitude > 0x7f800000 ? 0x7e00 : 0x7c00;
    const bits32 rounded = magnitude >= 0x477ff000 ? special : magnitude < 0x38800000 ? subnormal : normal;
    stored.bits = (unsigned short)(rounded | (bits >> 16 & 0x8000));
#endif
}

#define FOR_BOTH(NAME, FUNCTION) \
    INLINE float NAME(float a) { return FUNCTION##f(a); } \
    INLINE double NAME(double a) { return FUNCTION(a); }

#ifdef __CUDACC__
FOR_BOTH(exp_, exp)
INLINE float fma_(float a, float b, float c) { return fmaf(a, b, c); }
INLINE double fma_(double a, double b, double c) { return fma(a, b, c); }
#else
template <class R> INLINE R fma_(R a, R b, R c) { return a * b + c; }  // the host rounds twice, as torch does
#if defined(__FMA__) || defined(__ARM_FEATURE_FMA)
#define MULTIPLY_ADD(a, b, c) __builtin_fmaf(a, b, c)
#else
#define MULTIPLY_ADD(a, b, c) ((a) * (b) + (c))
#endif
// Clamps a to [-limit, limit]; not a number stays so. It works on bits, because comparing would take a vector several
// masks.
INLINE float within(float a, float limit) {
    const bits32 bits = as_bits(a);
    const int size = int(bits & 0x7fffffff), most = int(as_bits(limit));
    return a == a ? as_float(bits32(size < most ? size : most) | (bits & 0x80000000)) : a;
}

// Computes e^a = p 2^n for a moderate a, and returns p and, in the low bits of `exponent`, n. It reduces the range to
// [-ln 2 / 2, ln 2 / 2] and evaluates a polynomial. It has no branch, so it vectorises, unlike the library's function.
INLINE float exp_reduced(float a, bits32 &exponent) {
    const float shifted = MULTIPLY_ADD(a, 1.44269504f, 12582912.0f), whole = shifted - 12582912.0f;
    const float rest = MULTIPLY_ADD(whole, 2.12194440e-4f, MULTIPLY_ADD(whole, -0.693359375f, a));
    const float square = rest * rest;  // terms are added in pairs: the steps of a chain would wait for each other
    const float high = MULTIPLY_ADD(1.9875691500e-4f, rest, 1.3981999507e-3f);
    const float middle = MULTIPLY_ADD(8.3334519073e-3f, rest, 4.1665795894e-2f);
    const float low = MULTIPLY_ADD(1.6666665459e-1f, rest, 5.0000001201e-1f);
    const float tail = MULTIPLY_ADD(MULTIPLY_ADD(high, square, middle), square, low);
    exponent = as_bits(shifted);
    return MULTIPLY_ADD(tail, square, rest) + 1.0f;
}

// exp is accurate to 2 units in the last place and sigmoid to 3, except that a sigmoid does not go below about 1e-38.
INLINE float exp_(float a) {
    bits32 exponent;
    const float p = exp_reduced(within(a, 104.0f), exponent);
    const int n = int(exponent) - 0x4b400000, half = n >> 1;  // two factors, so that subnormal results come out right
    return p * as_float(bits32(half + 127) << 23) * as_float(bits32(n - half + 127) << 23);
}
INLINE float sigmoid_(float a) {
    bits32 exponent;
    const float p = exp_reduced(-within(a, 88.0f), exponent);
    return 1.0f / (p * as_float((exponent << 23) + 0x3f800000) + 1.0f);
}
INLINE double exp_(double a) { return exp(a); }
#endif
FOR_BOTH(exp2_, exp2) FOR_BOTH(expm1_, expm1) FOR_BOTH(log_, log) FOR_BOTH(log1p_, log1p) FOR_BOTH(log2_, log2)
FOR_BOTH(log10_, log10)
FOR_BOTH(sqrt_, sqrt) FOR_BOTH(sin_, sin) FOR_BOTH(cos_, cos) FOR_BOTH(tan_, tan) FOR_BOTH(asin_, asin)
FOR_BOTH(acos_, acos) FOR_BOTH(atan_, atan) FOR_BOTH(sinh_, sinh) FOR_BOTH(cosh_, cosh) FOR_BOTH(tanh_, tanh)
FOR_BOTH(erf_, erf) FOR_BOTH(erfc_, erfc) FOR_BOTH(floor_, floor) FOR_BOTH(ceil_, ceil) FOR_BOTH(round_, rint)
FOR_BOTH(trunc_, trunc) FOR_BOTH(abs_, fabs)
#undef FOR_BOTH

#ifdef __CUDACC__
// The special function unit computes these to one or two units in the last place. It takes subnormal numbers for 0.
INLINE float approximate_reciprocal(float a) {
    float r;
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(r) : "f"(a));
    return r;
}
INLINE float approximate_exp2(float a) {
    float r;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(r) : "f"(a));
    return r;
}
// The lesser and the greater of two numbers; a itself if it is not a number.
INLINE float at_most(float a, float limit) {
#if __CUDA_ARCH__ >= 800
    asm("min.NaN.f32 %0, %0, %1;" : "+f"(a) : "f"(limit));
    return a;
#else
    return a > limit ? limit : a;
#endif
}
INLINE float at_least(float a, float limit) {
#if __CUDA_ARCH__ >= 800
    asm("max.NaN.f32 %0, %0, %1;" : "+f"(a) : "f"(limit));
    return a;
#else
    return a < limit ? limit : a;
#endif
}

// 1 / a for a of at least 1, rounded to nearest. It does what the compiler's division does if neither a nor the result
// is subnormal or beyond the range, without the branch to the other cases. From 2^126 on the result stays 2^-126.
INLINE float reciprocal_within(float a) {
    const float r = approximate_reciprocal(a);
    return fmaf(r, -fmaf(a, r, -1.0f), r);
}
INLINE float reciprocal_(float a) { return reciprocal_within(at_most(a, 0x1.fffffep125f)); }

// It is accurate to 7 units in the last place, except that it does not go below about 1e-38. e^-a is 2^(high + low),
// where low is what the rounding of -a / ln 2 to high left out.
INLINE float sigmoid_(float a) {
    const float within = at_most(at_least(a, -87.0f), 87.0f), high = within * -1.44269502f;
    const float low = fmaf(within, -1.92596303e-8f, fmaf(within, -1.44269502f, -high));
    const float power = approximate_exp2(high);
    return reciprocal_within(fmaf(power, low * 0.693147182f, power) + 1.0f);
}
#else
INLINE float reciprocal_(float a) { return 1.0f / a; }
#endif
INLINE double reciprocal_(double a) { return 1.0 / a; }
INLINE double sigmoid_(double a) { return 1.0 / (1.0 + exp_(-a)); }
template <class R> INLINE R sigmoid_backward_(R grad, R y) {
#ifdef __CUDACC__
    return fma_(-grad, y, grad) * y;
#else
    return grad * (R(1) - y) * y;
#endif
}
template <class R> INLINE R rsqrt_(R a) { return R(1) / sqrt_(a); }
template <class R> INLINE R sign_(R a) { return R(a > R(0)) - R(a < R(0)); }
template <class R> INLINE R sgn_(R a) { return sign_(a); }
template <class R> INLINE R clamp_min_(R a, R low) { return a < low ? low : a; }
template <class R> INLINE R clamp_max_(R a, R high) { return a > high ? high : a; }
template <class R> INLINE R clamp_(R a, R low, R high) { return clamp_max_(clamp_min_(a, low), high); }
template <class R> INLINE R maximum_(R a, R b) { return a != a || a > b ? a : b; }
template <class R> INLINE R minimum_(R a, R b) { return a != a || a < b ? a : b; }
template <class R> INLINE R fmax_(R a, R b) { return b != b || a > b ? a : b; }
template <class R> INLINE R fmin_(R a, R b) { return b != b || a < b ? a : b; }
INLINE float pow_(float a, float b) { return powf(a, b); }
INLINE double pow_(double a, double b) { return pow(a, b); }
INLINE float atan2_(float a, float b) { return atan2f(a, b); }
INLINE double atan2_(double a, double b) { return atan2(a, b); }
INLINE float fmod_(float a, float b) { return fmodf(a, b); }
INLINE double fmod_(double a, double b) { return fmod(a, b); }
INLINE float hypot_(float a, float b) { return hypotf(a, b); }
INLINE double hypot_(double a, double b) { return hypot(a, b); }
