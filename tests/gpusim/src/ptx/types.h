// SPDX-License-Identifier: BSD-3-Clause
// Copyright (c) the resnet_fused authors
//
// PTX scalar types and state spaces.
#pragma once
#include <cstdint>
#include <string_view>

namespace gpusim::ptx {

using u8 = uint8_t; using u16 = uint16_t; using u32 = uint32_t; using u64 = uint64_t;
using s8 = int8_t; using s16 = int16_t; using s32 = int32_t; using s64 = int64_t;

enum class Type : u8 {
  None, B8, B16, B32, B64, B128, U8, U16, U32, U64, S8, S16, S32, S64,
  F16, F16x2, BF16, BF16x2, TF32, F32, F32x2, F64, U16x2, S16x2,
  E4M3, E5M2, E4M3x2, E5M2x2, Pred,
};

enum class Space : u8 { Generic, Global, Shared, SharedCluster, Local, Const, Param, Reg, None };

Type parse_type(std::string_view s);  // without the dot; None if not a type
int type_bytes(Type t);               // Pred: 4 (one lane mask per warp)
bool is_signed(Type t);
bool is_float(Type t);                // f16 family, f32, f64, tf32

// Generic addresses: global memory is host memory; the shared and local
// windows lie outside the canonical address range of the host.
constexpr u64 kSharedWindow = 0x1000000000000000ull;
constexpr u64 kLocalWindow = 0x2000000000000000ull;
constexpr u64 kWindowMask = 0xf000000000000000ull;
constexpr u64 kFunctionWindow = 0x3000000000000000ull;  // function "addresses"
// Shared addresses: bits 0..23 offset in the block; bits 24.. 0 = own block,
// else 1 + rank of the block in its cluster. User data starts past a reserved
// kilobyte, as on sm_80 and later.
constexpr u32 kSharedBase = 1024;
constexpr int kClusterShift = 24;
constexpr u32 kSharedOffsetMask = (1u << kClusterShift) - 1;

}  // namespace gpusim::ptx
