// What every CPU runs.
#include <cmath>
#include <cstdint>
#include <cstring>

#include "paths.h"

#define INLINE static inline __attribute__((always_inline))

namespace internjax {
namespace portable {
namespace {
#include "lanes_portable.h"
#include "matmul.h"
#include "float_matmul.h"
#include "attention.h"
}  // namespace
}  // namespace portable

const Path kPortable = {"portable", portable::quantize, portable::matmul, portable::float_matmul,
                        portable::attend, portable::merge, portable::sweep};

}  // namespace internjax
