// Attention over codes for an instruction set that differs from another in nothing else.

#include "kernels.hpp"

#include "coded.hpp"

namespace kvfold::ISA {

extern void (*const codes)(const Codes&);
void (*const codes)(const Codes&) = attend_codes;

}  // namespace kvfold::ISA
