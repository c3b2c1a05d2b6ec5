// SPDX-License-Identifier: BSD-3-Clause
// Copyright (c) the resnet_fused authors
//
// Splits PTX text into tokens.
#pragma once
#include <string>
#include <string_view>
#include <vector>

#include "types.h"

namespace gpusim::ptx {

struct Token {
  enum Kind : u8 { End, Ident, Int, Float32, Float64, String, Punct } kind = End;
  std::string_view text;  // identifiers keep their dots: "ld.global.v4.f32", ".reg", "%tid.x"
  u64 value = 0;          // Int: value; Float32/Float64: bits
  int line = 0;
  bool is(char c) const { return kind == Punct && text[0] == c; }
  bool is(std::string_view s) const { return text == s && kind != String; }
};

std::vector<Token> lex(std::string_view text);

}  // namespace gpusim::ptx
