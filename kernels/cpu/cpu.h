// Which path this CPU runs, and the floating-point mode that all paths need.
#pragma once

#include <string_view>

#include "paths.h"

namespace internjax {

// The path named `name` or, of "", the one that INTERNJAX_CPU_PATH names or else the fastest.
// Returns null where it is unknown or this CPU lacks its instructions.
const Path* find_path(std::string_view name);

// While it lives, subnormal numbers count (XLA turns them off) and rounding is to nearest even.
class PlainFloats {
 public:
  PlainFloats();
  ~PlainFloats();
  PlainFloats(const PlainFloats&) = delete;
  PlainFloats& operator=(const PlainFloats&) = delete;

 private:
  unsigned before_ = 0;
};

}  // namespace internjax
