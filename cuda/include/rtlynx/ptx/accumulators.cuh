// The accumulators of a wgmma, for its assembler text and as its operands: N / 2 of them for a tile of N columns.
#pragma once

#define RTLYNX_REGISTERS_8 "%0, %1, %2, %3, %4, %5, %6, %7"
#define RTLYNX_REGISTERS_16          \
  "%0, %1, %2, %3, %4, %5, %6, %7, " \
  "%8, %9, %10, %11, %12, %13, %14, %15"
#define RTLYNX_REGISTERS_32                  \
  "%0, %1, %2, %3, %4, %5, %6, %7, "         \
  "%8, %9, %10, %11, %12, %13, %14, %15, "   \
  "%16, %17, %18, %19, %20, %21, %22, %23, " \
  "%24, %25, %26, %27, %28, %29, %30, %31"
#define RTLYNX_REGISTERS_72                  \
  "%0, %1, %2, %3, %4, %5, %6, %7, "         \
  "%8, %9, %10, %11, %12, %13, %14, %15, "   \
  "%16, %17, %18, %19, %20, %21, %22, %23, " \
  "%24, %25, %26, %27, %28, %29, %30, %31, " \
  "%32, %33, %34, %35, %36, %37, %38, %39, " \
  "%40, %41, %42, %43, %44, %45, %46, %47, " \
  "%48, %49, %50, %51, %52, %53, %54, %55, " \
  "%56, %57, %58, %59, %60, %61, %62, %63, " \
  "%64, %65, %66, %67, %68, %69, %70, %71"
#define RTLYNX_REGISTERS_84                  \
  "%0, %1, %2, %3, %4, %5, %6, %7, "         \
  "%8, %9, %10, %11, %12, %13, %14, %15, "   \
  "%16, %17, %18, %19, %20, %21, %22, %23, " \
  "%24, %25, %26, %27, %28, %29, %30, %31, " \
  "%32, %33, %34, %35, %36, %37, %38, %39, " \
  "%40, %41, %42, %43, %44, %45, %46, %47, " \
  "%48, %49, %50, %51, %52, %53, %54, %55, " \
  "%56, %57, %58, %59, %60, %61, %62, %63, " \
  "%64, %65, %66, %67, %68, %69, %70, %71, " \
  "%72, %73, %74, %75, %76, %77, %78, %79, " \
  "%80, %81, %82, %83"
#define RTLYNX_REGISTERS_96                  \
  "%0, %1, %2, %3, %4, %5, %6, %7, "         \
  "%8, %9, %10, %11, %12, %13, %14, %15, "   \
  "%16, %17, %18, %19, %20, %21, %22, %23, " \
  "%24, %25, %26, %27, %28, %29, %30, %31, " \
  "%32, %33, %34, %35, %36, %37, %38, %39, " \
  "%40, %41, %42, %43, %44, %45, %46, %47, " \
  "%48, %49, %50, %51, %52, %53, %54, %55, " \
  "%56, %57, %58, %59, %60, %61, %62, %63, " \
  "%64, %65, %66, %67, %68, %69, %70, %71, " \
  "%72, %73, %74, %75, %76, %77, %78, %79, " \
  "%80, %81, %82, %83, %84, %85, %86, %87, " \
  "%88, %89, %90, %91, %92, %93, %94, %95"

#define RTLYNX_ACCUMULATE_4(d, i) "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3])
#define RTLYNX_ACCUMULATE_8(d, i) RTLYNX_ACCUMULATE_4(d, i), RTLYNX_ACCUMULATE_4(d, i + 4)
#define RTLYNX_ACCUMULATE_16(d, i) RTLYNX_ACCUMULATE_8(d, i), RTLYNX_ACCUMULATE_8(d, i + 8)
#define RTLYNX_ACCUMULATE_32(d, i) RTLYNX_ACCUMULATE_16(d, i), RTLYNX_ACCUMULATE_16(d, i + 16)
#define RTLYNX_ACCUMULATE_64(d, i) RTLYNX_ACCUMULATE_32(d, i), RTLYNX_ACCUMULATE_32(d, i + 32)
#define RTLYNX_ACCUMULATE_72(d, i) RTLYNX_ACCUMULATE_64(d, i), RTLYNX_ACCUMULATE_8(d, i + 64)
#define RTLYNX_ACCUMULATE_84(d, i) RTLYNX_ACCUMULATE_64(d, i), RTLYNX_ACCUMULATE_16(d, i + 64), RTLYNX_ACCUMULATE_4(d, i + 80)
#define RTLYNX_ACCUMULATE_96(d, i) RTLYNX_ACCUMULATE_64(d, i), RTLYNX_ACCUMULATE_32(d, i + 64)
