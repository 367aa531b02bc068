/* A stand-in for CUDA's runtime, driver and cuBLAS: one H200 whose memory is host memory and whose kernels are blank.
 *
 * Copies, fills and the bookkeeping of memory are real; a launch succeeds and computes nothing. The functions here give
 * something back that torch reads. All others that torch's libraries ask for only say "success": build.py writes them.
 */
#define _GNU_SOURCE
#include <cuda.h>
#include <cuda_runtime_api.h>
#include <dlfcn.h>
#include <limits.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#undef cuDevicePrimaryCtxGetState
#undef cudaGetDeviceProperties

enum { VERSION = 13000, MAJOR = 9, MINOR = 0, PROCESSORS = 132, THREADS = 1024, SHARED = 49152, SHARED_OPTIN = 232448 };
static const size_t TOTAL = (size_t)140 << 30, FREE = (size_t)139 << 30;

/* What this process has done; ctypes reads them. */
long standin_launches = 0; /* kernels and matrix products */
long standin_waits = 0;    /* times the host waited for the device, of which torch itself reports only some */

static int launched(void) { return __atomic_add_fetch(&standin_launches, 1, __ATOMIC_RELAXED), 0; }
static int waited(void) { return __atomic_add_fetch(&standin_waits, 1, __ATOMIC_RELAXED), 0; }
static int nothing(void) { return 0; }
/* Streams, events and handles are never looked into: any address that is no other one's will do. */
static int opaque(void **handle) { return (*handle = calloc(1, 64)) ? 0 : cudaErrorMemoryAllocation; }

/* The device. */
cudaError_t cudaGetDeviceCount(int *count) { return *count = 1, 0; }
cudaError_t cudaGetDevice(int *device) { return *device = 0, 0; }
cudaError_t cudaSetDevice(int device) { return device == 0 ? 0 : cudaErrorInvalidDevice; }
cudaError_t cudaDriverGetVersion(int *version) { return *version = VERSION, 0; }
cudaError_t cudaRuntimeGetVersion(int *version) { return *version = VERSION, 0; }
cudaError_t cudaDeviceCanAccessPeer(int *can, int device, int peer) { return *can = 0, 0; }
cudaError_t cudaDeviceGetStreamPriorityRange(int *least, int *greatest) { return *least = 0, *greatest = -5, 0; }
const char *cudaGetErrorString(cudaError_t error) { return "an error of the stand-in"; }
const char *cudaGetErrorName(cudaError_t error) { return "cudaErrorStandIn"; }

cudaError_t cudaDeviceGetPCIBusId(char *id, int length, int device) {
    return snprintf(id, length, "0000:00:00.0"), 0;
}

cudaError_t cudaGetDeviceProperties(struct cudaDeviceProp *p, int device) {
    *p = (struct cudaDeviceProp){
        .name = "stand-in H200", .major = MAJOR, .minor = MINOR, .multiProcessorCount = PROCESSORS,
        .totalGlobalMem = TOTAL, .warpSize = 32, .l2CacheSize = 50 << 20, .maxThreadsPerBlock = THREADS,
        .maxThreadsPerMultiProcessor = 2 * THREADS, .maxBlocksPerMultiProcessor = 32,
        .maxThreadsDim = {THREADS, THREADS, 64}, .maxGridSize = {INT_MAX, 65535, 65535},
        .regsPerBlock = 65536, .regsPerMultiprocessor = 65536, .sharedMemPerBlock = SHARED,
        .sharedMemPerBlockOptin = SHARED_OPTIN, .sharedMemPerMultiprocessor = SHARED_OPTIN + 1024,
    };
    return 0;
}

cudaError_t cudaDeviceGetAttribute(int *value, enum cudaDeviceAttr attribute, int device) {
    switch (attribute) {
    case cudaDevAttrComputeCapabilityMajor: *value = MAJOR; break;
    case cudaDevAttrComputeCapabilityMinor: *value = MINOR; break;
    case cudaDevAttrMultiProcessorCount: *value = PROCESSORS; break;
    case cudaDevAttrMaxThreadsPerBlock: *value = THREADS; break;
    case cudaDevAttrMaxGridDimX: *value = INT_MAX; break;
    case cudaDevAttrMaxSharedMemoryPerBlock: *value = SHARED; break;
    case cudaDevAttrMaxSharedMemoryPerBlockOptin: *value = SHARED_OPTIN; break;
    case cudaDevAttrWarpSize: *value = 32; break;
    default: *value = 1; /* most of the others ask whether the device can do something */
    }
    return 0;
}

/* Memory. Zeros at first: blank kernels leave what was there, and a run should not differ from the next. */
cudaError_t cudaMalloc(void **pointer, size_t size) {
    *pointer = NULL;
    if (posix_memalign(pointer, 2 << 20, size ? size : 1)) return cudaErrorMemoryAllocation;
    return memset(*pointer, 0, size), 0;
}
cudaError_t cudaMallocAsync(void **pointer, size_t size, cudaStream_t stream) { return cudaMalloc(pointer, size); }
cudaError_t cudaHostAlloc(void **pointer, size_t size, unsigned flags) { return cudaMalloc(pointer, size); }
cudaError_t cudaFree(void *pointer) { return free(pointer), 0; }
cudaError_t cudaFreeAsync(void *pointer, cudaStream_t stream) { return free(pointer), 0; }
cudaError_t cudaFreeHost(void *pointer) { return free(pointer), 0; }
cudaError_t cudaMemGetInfo(size_t *free, size_t *total) { return *free = FREE, *total = TOTAL, 0; }
cudaError_t cudaMemset(void *to, int value, size_t size) { return memset(to, value, size), 0; }
cudaError_t cudaMemsetAsync(void *to, int value, size_t size, cudaStream_t s) { return memset(to, value, size), 0; }
cudaError_t cudaMemPoolGetAttribute(cudaMemPool_t pool, enum cudaMemPoolAttr attribute, void *value) {
    return *(cuuint64_t *)value = 0, 0;
}
cudaError_t cudaGetSymbolAddress(void **pointer, const void *symbol) { return *pointer = calloc(1, 4096), 0; }

cudaError_t cudaMemcpy(void *to, const void *from, size_t size, enum cudaMemcpyKind kind) {
    return memmove(to, from, size), waited();
}
cudaError_t cudaMemcpyAsync(void *to, const void *from, size_t size, enum cudaMemcpyKind kind, cudaStream_t stream) {
    return memmove(to, from, size), 0;
}
cudaError_t cudaMemcpy2DAsync(void *to, size_t to_pitch, const void *from, size_t from_pitch, size_t width,
                              size_t height, enum cudaMemcpyKind kind, cudaStream_t stream) {
    for (size_t row = 0; row < height; row++)
        memmove((char *)to + row * to_pitch, (const char *)from + row * from_pitch, width);
    return 0;
}

cudaError_t cudaDeviceSynchronize(void) { return waited(); }
cudaError_t cudaStreamSynchronize(cudaStream_t stream) { return waited(); }
cudaError_t cudaEventSynchronize(cudaEvent_t event) { return waited(); }

/* Pinned or not is torch's own record; the device's answer only tells foreign memory apart. */
cudaError_t cudaPointerGetAttributes(struct cudaPointerAttributes *found, const void *pointer) {
    *found = (struct cudaPointerAttributes){.type = cudaMemoryTypeUnregistered};
    return 0;
}

/* Streams and events: everything is over as soon as it is asked for. */
cudaError_t cudaStreamCreate(cudaStream_t *stream) { return opaque((void **)stream); }
cudaError_t cudaStreamCreateWithPriority(cudaStream_t *s, unsigned flags, int priority) { return opaque((void **)s); }
cudaError_t cudaStreamGetPriority(cudaStream_t stream, int *priority) { return *priority = 0, 0; }
cudaError_t cudaEventCreate(cudaEvent_t *event) { return opaque((void **)event); }
cudaError_t cudaEventCreateWithFlags(cudaEvent_t *event, unsigned flags) { return opaque((void **)event); }
cudaError_t cudaEventElapsedTime(float *milliseconds, cudaEvent_t from, cudaEvent_t to) { return *milliseconds = 1, 0; }

/* Graphs: what is launched while a stream is recorded counts as launched; a graph's own launch counts as one more. */
static __thread enum cudaStreamCaptureStatus recording = cudaStreamCaptureStatusNone;

cudaError_t cudaStreamBeginCapture(cudaStream_t stream, enum cudaStreamCaptureMode mode) {
    return recording = cudaStreamCaptureStatusActive, 0;
}
cudaError_t cudaStreamEndCapture(cudaStream_t stream, cudaGraph_t *graph) {
    return recording = cudaStreamCaptureStatusNone, opaque((void **)graph);
}
cudaError_t cudaGraphInstantiateWithFlags(cudaGraphExec_t *exec, cudaGraph_t graph, unsigned long long flags) {
    return opaque((void **)exec);
}
cudaError_t cudaGraphGetNodes(cudaGraph_t graph, cudaGraphNode_t *nodes, size_t *count) { return *count = 1, 0; }
cudaError_t cudaGraphLaunch(cudaGraphExec_t exec, cudaStream_t stream) { return launched(); }
cudaError_t cudaStreamIsCapturing(cudaStream_t stream, enum cudaStreamCaptureStatus *status) {
    return *status = recording, 0;
}
cudaError_t cudaStreamGetCaptureInfo(cudaStream_t stream, enum cudaStreamCaptureStatus *status, unsigned long long *id,
                                     cudaGraph_t *graph, const cudaGraphNode_t **dependencies,
                                     const cudaGraphEdgeData **edges, size_t *count) {
    *status = recording;
    if (id) *id = 1;
    if (graph) *graph = NULL;
    if (count) *count = 0;
    return 0;
}

/* Kernels. `kernel<<<grid, block>>>(...)` compiles to a push, a pop in the kernel's host side, and a launch. */
static __thread struct { dim3 grid, block; size_t shared; void *stream; } pushed;

unsigned __cudaPushCallConfiguration(dim3 grid, dim3 block, size_t shared, void *stream) {
    pushed.grid = grid, pushed.block = block, pushed.shared = shared, pushed.stream = stream;
    return 0;
}
cudaError_t __cudaPopCallConfiguration(dim3 *grid, dim3 *block, size_t *shared, void *stream) {
    *grid = pushed.grid, *block = pushed.block, *shared = pushed.shared, *(void **)stream = pushed.stream;
    return 0;
}
void **__cudaRegisterFatBinary(void *binary) { return calloc(1, 64); }
int __cudaLaunchKernel(void) { return launched(); }
cudaError_t cudaLaunchKernelExC(const cudaLaunchConfig_t *c, const void *f, void **a) { return launched(); }

cudaError_t cudaFuncGetAttributes(struct cudaFuncAttributes *attributes, const void *function) {
    *attributes = (struct cudaFuncAttributes){
        .maxThreadsPerBlock = THREADS, .numRegs = 32, .binaryVersion = 10 * MAJOR + MINOR,
        .ptxVersion = 10 * MAJOR + MINOR, .maxDynamicSharedSizeBytes = SHARED_OPTIN,
    };
    return 0;
}
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(int *blocks, const void *function, int threads,
                                                                   size_t shared, unsigned flags) {
    return *blocks = 2, 0;
}

/* The driver: torch finds it by dlopen("libcuda.so.1"), the name this library was linked with, or through here. */
cudaError_t cudaGetDriverEntryPointByVersion(const char *name, void **function, unsigned version,
                                             unsigned long long flags, enum cudaDriverEntryPointQueryResult *result) {
    *function = dlsym(RTLD_DEFAULT, name);
    if (!*function) *function = (void *)nothing;
    if (result) *result = cudaDriverEntryPointSuccess;
    return 0;
}
CUresult cuDriverGetVersion(int *version) { return *version = VERSION, 0; }
CUresult cuDeviceGetCount(int *count) { return *count = 1, 0; }
CUresult cuDeviceGet(CUdevice *device, int ordinal) { return *device = 0, 0; }
CUresult cuDeviceGetName(char *name, int length, CUdevice device) { return snprintf(name, length, "stand-in H200"), 0; }
CUresult cuCtxGetCurrent(CUcontext *context) { return *context = (CUcontext)8, 0; }
CUresult cuDevicePrimaryCtxGetState(CUdevice device, unsigned *flags, int *on) { return *flags = 0, *on = 1, 0; }
CUresult cuGetErrorString(CUresult error, const char **text) { return *text = "an error of the stand-in", 0; }
CUresult cuDeviceGetAttribute(int *value, CUdevice_attribute attribute, CUdevice device) {
    return (CUresult)cudaDeviceGetAttribute(value, (enum cudaDeviceAttr)attribute, device); /* the same numbers */
}

/* cuBLAS, whose headers need not be there. A heuristic result is 96 bytes, of which zeros mean "works". */
int cublasCreate_v2(void **handle) { return opaque(handle); }
int cublasGetPointerMode_v2(void *handle, int *mode) { return *mode = 0, 0; }
int cublasGetMathMode(void *handle, int *mode) { return *mode = 0, 0; }
int cublasLtMatmulDescCreate(void **description, int compute, int scale) { return opaque(description); }
int cublasLtMatrixLayoutCreate(void **layout, int type, cuuint64_t rows, cuuint64_t columns, long leading) {
    return opaque(layout);
}
int cublasLtMatmulPreferenceCreate(void **preference) { return opaque(preference); }
size_t cublasLtGetVersion(void) { return 130000; }
int cublasLtMatmulAlgoGetHeuristic(void *handle, void *operation, void *a, void *b, void *c, void *d, void *preference,
                                   int wanted, void *results, int *found) {
    return memset(results, 0, 96), *found = 1, 0;
}
int cublasLtMatmul(void) { return launched(); }
int cublasGemmEx(void) { return launched(); }
int cublasSgemm_v2(void) { return launched(); }
int cublasGemmStridedBatchedEx(void) { return launched(); }
int cublasSgemmStridedBatched(void) { return launched(); }
