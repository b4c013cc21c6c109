#include "nf4/nf4.h"
