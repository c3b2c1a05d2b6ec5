// SPDX-License-Identifier: BSD-3-Clause
// Copyright (c) the resnet_fused authors
//
// The same code compiled for sm_90a.
#include "library.cu"
