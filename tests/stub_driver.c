/* Stands for NVIDIA's libcuda.so.1, as far as serve/engine/driver.py asks. STUB_DRIVER says what it finds:
   "none": no device; "old": a driver for CUDA 12.8; "hidden": no device to be seen; "one" and "two": devices that nothing runs on. */
#include <stdlib.h>
#include <string.h>

static int is(const char *what) {
    const char *said = getenv("STUB_DRIVER");
    return said && strcmp(said, what) == 0;
}

int cuDriverGetVersion(int *version) {
    *version = is("old") ? 12080 : 13000;
    return 0;
}

int cuInit(unsigned flags) { return is("none") ? 100 : 0; }

int cuDeviceGetCount(int *count) {
    *count = is("one") + 2 * is("two");
    return 0;
}

int cuDeviceGet(int *device, int ordinal) {
    *device = 40 + ordinal;
    return 0;
}

int cuDeviceGetName(char *name, int size, int device) {
    strncpy(name, device == 40 ? "NVIDIA One" : "NVIDIA Two", size);
    return 0;
}

int cuGetErrorName(int code, const char **name) {
    *name = code == 100 ? "CUDA_ERROR_NO_DEVICE" : "CUDA_ERROR_UNKNOWN";
    return 0;
}
