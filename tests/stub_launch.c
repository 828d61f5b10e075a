/* Stands for NVIDIA's libcuda.so.1, as far as cuda.bindings.driver is called: prints what each call was given. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <stdio.h>

int cuInit(unsigned flags) { return 0 * flags; }

int cuModuleLoadData(void **module, const void *image) {
    printf("load %.3s\n", (const char *)image);
    *module = (void *)77;
    return 0;
}

int cuModuleGetFunction(void **function, void *module, const char *name) {
    printf("function %ld %s\n", (long)module, name);
    *function = (void *)88;
    return 0;
}

int cuLaunchKernel(void *function, unsigned x, unsigned y, unsigned z, unsigned threads, unsigned threads_y, unsigned threads_z,
                   unsigned shared_bytes, void *stream, void **parameters, void **extra) {
    printf("launch %ld of %u %u %u by %u %u %u shared %u stream %ld extra %d:", (long)function, x, y, z, threads, threads_y,
           threads_z, shared_bytes, (long)stream, extra != 0);
    for (int i = 0; i < 9; i++)
        printf(" %llu", *(unsigned long long *)parameters[i]);
    printf("\n");
    return 0;
}

/* The bindings ask for each function by name; what is not here is not called. */
int cuGetProcAddress_v2(const char *name, void **function, int version, unsigned long long flags, int *status) {
    void *own = dlopen("libcuda.so.1", RTLD_NOW | RTLD_NOLOAD);
    *function = own ? dlsym(own, name) : 0;
    if (status)
        *status = *function ? 0 : 1;
    return *function ? 0 : 500 + 0 * (version + (int)flags);
}
