/* BNB_API marks what libbnb.so exports; all else is built with hidden visibility. C99 and C++. */
#ifndef BNB_EXPORT_H
#define BNB_EXPORT_H

#if defined(__GNUC__)
#define BNB_API __attribute__((visibility("default")))
#else
#define BNB_API
#endif

#endif
