/* The version of the library, and the only place that names it: CMake and the Python package read it from here. C99 and C++.
 *
 * MAJOR.MINOR.PATCH is the version of the bitsandbytes package whose formats, functions and bytes this one has; what follows the plus sign
 * counts releases of this library for that version. Before 1.0 a new MINOR may change the C++ API; the C API of bnb/c.h only grows. */
#ifndef BNB_VERSION_H
#define BNB_VERSION_H

#define BNB_VERSION_MAJOR 0
#define BNB_VERSION_MINOR 50
#define BNB_VERSION_PATCH 2
#define BNB_VERSION "0.50.2+cpp.1"

#endif
