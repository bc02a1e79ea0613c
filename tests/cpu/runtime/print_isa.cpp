// Prints the instruction set in use, or the error: what BNB_FORCE_ISA does to a fresh process (dispatch_test.cpp).
#include <bnb/bnb.h>

#include <cstdio>
#include <string>

int main() {
  try {
    std::printf("%s", std::string(bnb::active_isa()).c_str());
    return 0;
  } catch (const bnb::Error& e) {
    std::printf("%s", e.what());
    return e.code() == bnb::Errc::unsupported ? 3 : 4;
  }
}
