// SPDX-License-Identifier: BSD-3-Clause
// Copyright (c) the resnet_fused authors
//
// The storage types of the CPU kernels, included by what is compiled once per instruction set: in an unnamed namespace,
// so that no copy can stand in for another instruction set's.

namespace resnet_fused::cpu {
namespace {

// ---- storage types ---------------------------------------------------------------------------------------------

template <class To, class From>
inline To bit_cast(From from) {
  static_assert(sizeof(To) == sizeof(From));
  return __builtin_bit_cast(To, from);
}

// A storage type T names its accumulation type, and converts from and to it.
struct Float64 {
  using Value = double;
  using Acc = double;
  static inline Acc load(Value v) { return v; }
  static inline Value store(Acc v) { return v; }
};

struct Float32 {
  using Value = float;
  using Acc = float;
  static inline Acc load(Value v) { return v; }
  static inline Value store(Acc v) { return v; }
};

struct BFloat16 {
  static constexpr bool kIsBFloat16 = true;
  using Value = uint16_t;
  using Acc = float;
  static inline Acc load(Value v) { return widen<uint32_t, float>(v); }
  static inline Value store(Acc v) { return static_cast<Value>(narrow<uint32_t, float>(v)); }

  // Between floats and the type's bits in 32-bit words, scalars or vectors.
  template <class Word, class Float>
  static inline Float widen(Word bits) {
    return bit_cast<Float>(bits << 16);
  }
  template <class Word, class Float>
  static inline Word narrow(Float v) {  // round to nearest, ties to even
    const Word bits = bit_cast<Word>(v);
    const Word rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
    const Word nan = Word{} + 0x7fc0u;
    return (bits & 0x7fffffffu) > 0x7f800000u ? nan : rounded;
  }
};

struct Float16 {
  static constexpr bool kIsBFloat16 = false;
  using Value = uint16_t;
  using Acc = float;
  static inline Acc load(Value v) { return widen<uint32_t, float>(v); }
  static inline Value store(Acc v) { return static_cast<Value>(narrow<uint32_t, float>(v)); }

  template <class Word, class Float>
  static inline Float widen(Word half) {
    const Word magnitude = (half & 0x7fffu) << 13;
    // The exponent bias differs by 127 - 15 = 112; multiplying by 2^112 also normalises denormals.
    const Word finite = bit_cast<Word>(bit_cast<Float>(magnitude) * 0x1p112f);
    const Word special = magnitude | 0x7f800000u;
    const Word bits = magnitude >= 0x0f800000u ? special : finite;
    return bit_cast<Float>(bits | ((half & 0x8000u) << 16));
  }
  template <class Word, class Float>
  static inline Word narrow(Float v) {  // round to nearest, ties to even
    const Word bits = bit_cast<Word>(v);
    const Word sign = (bits >> 16) & 0x8000u;
    const Word magnitude = bits & 0x7fffffffu;
    const Word normal = (magnitude - (112u << 23) + 0xfffu + ((magnitude >> 13) & 1u)) >> 13;
    // Adding 0.5 puts the denormal's last bit at the last bit of a float: the addition rounds.
    const Word denormal = bit_cast<Word>(bit_cast<Float>(magnitude) + 0.5f) - 0x3f000000u;
    const Word finite = magnitude < 0x38800000u ? denormal : normal;
    const Word nan = Word{} + 0x7e00u, infinity = Word{} + 0x7c00u;
    const Word special = magnitude > 0x7f800000u ? nan : infinity;
    return (magnitude >= 0x47800000u ? special : finite) | sign;
  }
};

}  // namespace
}  // namespace resnet_fused::cpu
