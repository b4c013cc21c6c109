#include <torch/csrc/stable/library.h>
#include "nf4/nf4.h"
