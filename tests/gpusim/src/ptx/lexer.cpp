// SPDX-License-Identifier: BSD-3-Clause
// Copyright (c) the resnet_fused authors
#include "lexer.h"

#include <bit>
#include <cstdlib>

#include "gpusim/ptx.h"

namespace gpusim::ptx {
namespace {

bool ident_start(char c) { return isalpha(u8(c)) || c == '_' || c == '$' || c == '%' || c == '.'; }
bool ident_char(char c) { return isalnum(u8(c)) || c == '_' || c == '$' || c == '%'; }

}  // namespace

std::vector<Token> lex(std::string_view s) {
  std::vector<Token> out;
  out.reserve(s.size() / 4);
  size_t i = 0;
  const size_t n = s.size();
  int line = 1;
  auto at = [&](size_t k) { return k < n ? s[k] : '\0'; };
  while (i < n) {
    char c = s[i];
    if (c == '\n') { ++line; ++i; continue; }
    if (isspace(u8(c)) || c == '\0') { ++i; continue; }
    if (c == '/' && at(i + 1) == '/') {
      while (i < n && s[i] != '\n') ++i;
      continue;
    }
    if (c == '/' && at(i + 1) == '*') {
      i += 2;
      while (i < n && !(s[i] == '*' && at(i + 1) == '/')) { if (s[i] == '\n') ++line; ++i; }
      i += 2;
      continue;
    }
    Token t;
    t.line = line;
    size_t b = i;
    if (ident_start(c) && !(c == '.' && isdigit(u8(at(i + 1))))) {
      ++i;
      for (;;) {
        if (ident_char(at(i))) ++i;
        else if (at(i) == '.' && ident_char(at(i + 1))) ++i;
        else if (at(i) == ':' && at(i + 1) == ':' && ident_char(at(i + 2))) i += 2;
        else break;
      }
      t.kind = Token::Ident;
      t.text = s.substr(b, i - b);
    } else if (isdigit(u8(c)) || (c == '.' && isdigit(u8(at(i + 1))))) {
      char x = at(i + 1);
      if (c == '0' && (x == 'f' || x == 'F') && isxdigit(u8(at(i + 2)))) {
        i += 2;
        u64 v = 0;
        for (int k = 0; k < 8 && isxdigit(u8(at(i))); ++k, ++i) v = v * 16 + u64(isdigit(u8(s[i])) ? s[i] - '0' : (s[i] | 32) - 'a' + 10);
        t.kind = Token::Float32;
        t.value = v;
      } else if (c == '0' && (x == 'd' || x == 'D') && isxdigit(u8(at(i + 2)))) {
        i += 2;
        u64 v = 0;
        for (int k = 0; k < 16 && isxdigit(u8(at(i))); ++k, ++i) v = v * 16 + u64(isdigit(u8(s[i])) ? s[i] - '0' : (s[i] | 32) - 'a' + 10);
        t.kind = Token::Float64;
        t.value = v;
      } else {
        int base = 10;
        if (c == '0' && (x == 'x' || x == 'X')) { base = 16; i += 2; }
        else if (c == '0' && (x == 'b' || x == 'B')) { base = 2; i += 2; }
        else if (c == '0' && isdigit(u8(x))) base = 8;
        size_t d = i;
        while (base == 16 ? isxdigit(u8(at(i))) : isdigit(u8(at(i)))) ++i;
        bool real = base <= 10 && base != 2 &&
                    ((at(i) == '.' && (isdigit(u8(at(i + 1))) || !ident_char(at(i + 1)))) ||
                     ((at(i) | 32) == 'e' && (isdigit(u8(at(i + 1))) || at(i + 1) == '-' || at(i + 1) == '+')));
        if (real) {
          if (at(i) == '.') ++i;
          while (isdigit(u8(at(i)))) ++i;
          if ((at(i) | 32) == 'e') {
            ++i;
            if (at(i) == '-' || at(i) == '+') ++i;
            while (isdigit(u8(at(i)))) ++i;
          }
          t.kind = Token::Float64;
          t.value = std::bit_cast<u64>(std::strtod(std::string(s.substr(b, i - b)).c_str(), nullptr));
        } else {
          t.kind = Token::Int;
          t.value = std::strtoull(std::string(s.substr(d, i - d)).c_str(), nullptr, base);
          if (at(i) == 'U' || at(i) == 'u') ++i;
        }
      }
      t.text = s.substr(b, i - b);
    } else if (c == '"') {
      ++i;
      while (i < n && s[i] != '"') { if (s[i] == '\\') ++i; ++i; }
      t.kind = Token::String;
      t.text = s.substr(b + 1, i - b - 1);
      ++i;
    } else {
      t.kind = Token::Punct;
      t.text = s.substr(i, 1);
      ++i;
    }
    out.push_back(t);
  }
  Token end;
  end.line = line;
  end.text = "end of text";
  out.push_back(end);
  return out;
}

}  // namespace gpusim::ptx
