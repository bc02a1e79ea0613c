// Everything public: #include <bnb/bnb.h>
#pragma once

#include <bnb/codebook.h>
#include <bnb/convert.h>
#include <bnb/cpu.h>
#include <bnb/error.h>
#include <bnb/gemm.h>
#include <bnb/int8.h>
#include <bnb/optim.h>
#include <bnb/parallel.h>
#include <bnb/quantize.h>
#include <bnb/state.h>
#include <bnb/types.h>
#include <bnb/version.h>
