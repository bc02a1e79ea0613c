// A target of the parent that has nothing to do with the library: no header of it is found here.
#if __has_include(<bnb/bnb.h>)
#error "include directories of the library leaked"
#endif
int main() { return 0; }
