/* The C interface, in C99: a weight is quantized, taken apart as a checkpoint would have it, read back, decoded and multiplied; and what is
 * wrong is refused with a status and a text. */
#include <bnb/c.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { M = 3, N = 64, K = 128 };

static int failures = 0;

static void expect(int ok, const char* what) {
  if (ok) return;
  fprintf(stderr, "failed: %s (last error: %s)\n", what, bnb_last_error());
  failures++;
}

static void refused(bnb_status status, bnb_status expected, const char* words) {
  if (status == expected && strstr(bnb_last_error(), words)) return;
  fprintf(stderr, "status %d, \"%s\"; expected status %d and \"%s\"\n", (int)status, bnb_last_error(), (int)expected, words);
  failures++;
}

static void product_is_right(const bnb_weight* w, const float* x, const float* bias, double tolerance) {
  float *decoded = malloc(sizeof(float) * N * K), y[M * N];
  int i, j, l;
  expect(bnb_weight_dequantize(w, decoded, BNB_F32, N * K) == BNB_OK, "dequantize");
  expect(bnb_weight_gemm(w, x, BNB_F32, M, bias, BNB_F32, 0.0f, y) == BNB_OK, "gemm");
  for (i = 0; i < M; i++)
    for (j = 0; j < N; j++) {
      double sum = bias[j];
      for (l = 0; l < K; l++) sum += (double)x[i * K + l] * decoded[j * K + l];
      if (!(fabs(sum - y[i * N + j]) < tolerance)) {
        fprintf(stderr, "y[%d][%d] is %g, expected %g\n", i, j, y[i * N + j], sum);
        failures++;
        i = M;
        break;
      }
    }
  free(decoded);
}

static void read_back(const bnb_weight* w, const float* x, const float* bias) {
  size_t bytes, count, dims, again_bytes, again_count, i;
  const void* codes = bnb_weight_codes(w, &bytes);
  const bnb_tensor* items = bnb_weight_items(w, &count);
  const bnb_tensor* again_items;
  const int64_t* shape;
  bnb_weight* again = NULL;
  expect(bnb_weight_read_4bit(codes, bytes, items, count, &again) == BNB_OK, "read_4bit");
  if (!again) return;
  shape = bnb_weight_shape(again, &dims);
  expect(dims == 2 && shape[0] == N && shape[1] == K && bnb_weight_elements(again) == N * K, "the shape");
  expect(bnb_weight_format(again) == bnb_weight_format(w), "the format");
  expect(memcmp(bnb_weight_codes(again, &again_bytes), codes, bytes) == 0 && again_bytes == bytes, "the codes");
  again_items = bnb_weight_items(again, &again_count);
  expect(again_count == count, "the number of items");
  for (i = 0; i < count; i++)
    expect(strcmp(items[i].name, again_items[i].name) == 0 && items[i].size == again_items[i].size &&
               memcmp(items[i].data, again_items[i].data, (size_t)items[i].size) == 0,
           items[i].name);
  product_is_right(again, x, bias, 1e-3);
  bnb_weight_free(again);

  again = NULL;
  refused(bnb_weight_read_4bit(codes, bytes - 1, items, count, &again), BNB_INVALID_ARGUMENT, "codes is 4095 elements");
  refused(bnb_weight_read_4bit(codes, bytes, items, count - 1, &again), BNB_INVALID_ARGUMENT, "without a state");
  refused(bnb_weight_read_4bit(codes, bytes, items + 1, count - 1, &again), BNB_INVALID_ARGUMENT, "absmax");
  refused(bnb_weight_read_8bit(codes, bytes, items, count, &again), BNB_INVALID_ARGUMENT, "read_4bit");
  refused(bnb_weight_read_4bit(codes, bytes, NULL, 1, &again), BNB_INVALID_ARGUMENT, "items is NULL");
  expect(again == NULL, "a refused weight is not made");
}

int main(void) {
  float *weight = malloc(sizeof(float) * N * K), x[M * K], bias[N], y[1];
  const int64_t shape[2] = {N, K}, wrong[2] = {-1, K}, huge[2] = {INT64_MAX / 8, 8};
  bnb_weight* w = NULL;
  uint16_t half[3];
  const float numbers[3] = {1.0f, -65520.0f, 1e-8f};
  int i, format;
  for (i = 0; i < N * K; i++) weight[i] = (float)sin(i * 0.37);
  for (i = 0; i < M * K; i++) x[i] = (float)cos(i * 0.11);
  for (i = 0; i < N; i++) bias[i] = (float)i;
  expect(strcmp(bnb_version(), BNB_VERSION) == 0, "the version");
  expect(bnb_isa() != NULL, "the instruction set");

  for (format = BNB_NF4; format <= BNB_FP4; format++)
    for (i = 0; i < 2; i++) {
      w = NULL;
      expect(bnb_weight_quantize(weight, BNB_F32, shape, 2, format, 64, i, &w) == BNB_OK, "quantize to 4 bits");
      product_is_right(w, x, bias, 1e-3);
      read_back(w, x, bias);
      bnb_weight_free(w);
    }

  w = NULL;
  expect(bnb_weight_quantize(weight, BNB_F32, shape, 2, BNB_INT8, 0, 0, &w) == BNB_OK, "quantize to int8");
  product_is_right(w, x, bias, 0.5);
  {
    size_t bytes, rows, items;
    bnb_weight* again = NULL;
    const int8_t* codes = bnb_weight_codes(w, &bytes);
    const float* scale = bnb_weight_row_scale(w, &rows);
    expect(bytes == N * K && rows == N && bnb_weight_items(w, &items) == NULL && items == 0, "what an int8 weight has");
    expect(bnb_weight_read_int8(codes, scale, N, K, &again) == BNB_OK, "read_int8");
    product_is_right(again, x, bias, 0.5);
    bnb_weight_free(again);
  }
  refused(bnb_weight_gemm(w, x, BNB_F64, M, NULL, 0, 0.0f, y), BNB_INVALID_ARGUMENT, "type is 3");
  refused(bnb_weight_gemm(w, x, BNB_F32, -1, NULL, 0, 0.0f, y), BNB_INVALID_ARGUMENT, "m * k");
  refused(bnb_weight_gemm(w, NULL, BNB_F32, M, NULL, 0, 0.0f, y), BNB_INVALID_ARGUMENT, "null");
  refused(bnb_weight_dequantize(w, weight, BNB_F32, 5), BNB_INVALID_ARGUMENT, "out is 5 elements");
  bnb_weight_free(w);

  w = NULL;
  expect(bnb_weight_quantize(weight, BNB_F32, shape, 2, BNB_DYNAMIC8, 256, 1, &w) == BNB_OK, "quantize to 8 bits");
  {
    float* back = malloc(sizeof(float) * N * K);
    double worst = 0;
    expect(bnb_weight_dequantize(w, back, BNB_F32, N * K) == BNB_OK, "decode 8 bits");
    for (i = 0; i < N * K; i++)
      if (fabs(back[i] - weight[i]) > worst) worst = fabs(back[i] - weight[i]);
    expect(worst > 0 && worst < 0.02, "8 bits are near");
    free(back);
  }
  refused(bnb_weight_gemm(w, x, BNB_F32, M, NULL, 0, 0.0f, y), BNB_INVALID_ARGUMENT, "BNB_DYNAMIC8");
  bnb_weight_free(w);

  w = NULL;
  refused(bnb_weight_quantize(weight, BNB_F32, wrong, 2, BNB_NF4, 64, 0, &w), BNB_INVALID_ARGUMENT, "shape is 1 * -1");
  refused(bnb_weight_quantize(weight, BNB_F32, shape, 2, BNB_NF4, 63, 0, &w), BNB_INVALID_ARGUMENT, "blocksize is 63");
  refused(bnb_weight_quantize(weight, BNB_F32, shape, 2, 77, 64, 0, &w), BNB_INVALID_ARGUMENT, "format is 77");
  refused(bnb_weight_quantize(weight, BNB_U8, shape, 2, BNB_NF4, 64, 0, &w), BNB_INVALID_ARGUMENT, "type is 4");
  refused(bnb_weight_quantize(NULL, BNB_F32, shape, 2, BNB_NF4, 64, 0, &w), BNB_INVALID_ARGUMENT, "null");
  refused(bnb_weight_quantize(weight, BNB_F32, shape, 2, BNB_NF4, 64, 0, NULL), BNB_INVALID_ARGUMENT, "result is NULL");
  refused(bnb_weight_quantize(weight, BNB_F32, huge, 2, BNB_NF4, 64, 0, &w), BNB_OUT_OF_MEMORY, "memory");
  refused(bnb_weight_dequantize(NULL, y, BNB_F32, 1), BNB_INVALID_ARGUMENT, "weight is NULL");
  refused(bnb_set_num_threads(-1), BNB_INVALID_ARGUMENT, "threads is -1");
  expect(w == NULL, "a refused weight is not made");
  expect(bnb_weight_elements(NULL) == 0 && bnb_weight_shape(NULL, NULL) == NULL && bnb_weight_codes(NULL, NULL) == NULL, "no weight");
  bnb_weight_free(NULL);

  expect(bnb_convert(numbers, BNB_F32, half, BNB_F16, 3) == BNB_OK, "convert");
  expect(half[0] == 0x3c00 && half[1] == 0xfc00 && half[2] == 0, "fp16");

  free(weight);
  if (failures == 0) printf("bnb %s on %s\n", bnb_version(), bnb_isa());
  return failures != 0;
}
