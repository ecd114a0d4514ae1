/* A CUDA runtime without a GPU, for tests: the functions and signatures of cuda_runtime_api.h that are used, device
   memory on the heap, every stream done at once, events on the monotonic clock. "Kernels" are fake_launch: dst = 2 src.
   With OLD defined it has cudaGraphInstantiate as CUDA 10.2 has it, else cudaGraphInstantiateWithFlags. */
#ifndef GPU_NAME
#define GPU_NAME "Orin"
#endif
#include <stdlib.h>
#include <string.h>
#include <time.h>

typedef struct op { int kind; void *dst; const void *src; size_t n; struct op *next; } op;
typedef struct { op *first, *last; } graph;
typedef struct { graph *captured; } stream;
typedef struct { long long ns; } event;

static int status, live, device_flags, integrated, copies, launches, graph_launches, fails_capture;
static int streams, stream_mib;
static long long kernel_ns;

static long long now(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return t.tv_sec * 1000000000LL + t.tv_nsec;
}
static void run(const op *o) {
    if (o->kind) { memcpy(o->dst, o->src, o->n); copies++; return; }
    long long end = now() + kernel_ns;
    for (size_t i = 0; i < o->n; i++) ((float *)o->dst)[i] = 2.0f * ((const float *)o->src)[i];
    launches++;
    while (now() < end) ;
}
static int give(stream *s, op o) {
    if (!s->captured) { run(&o); return 0; }
    op *kept = malloc(sizeof *kept);
    *kept = o; kept->next = NULL;
    if (s->captured->last) s->captured->last->next = kept; else s->captured->first = kept;
    s->captured->last = kept;
    return 0;
}

/* for tests */
void fake_reset(int s, long long ns, int shared, int capture) {
    status = s; kernel_ns = ns; integrated = shared; fails_capture = capture;
    copies = launches = graph_launches = device_flags = 0;
}
void fake_memory(int mib_of_a_stream) { stream_mib = mib_of_a_stream; }
int fake_seen(int what) { int all[] = {live, copies, launches, graph_launches, device_flags}; return all[what]; }
int fake_launch(void *s, void *dst, void *src, size_t n) { return give(s, (op){0, dst, src, n, NULL}); }

int cudaGetDeviceCount(int *n) { *n = status ? 0 : 1; return status; }
int cudaSetDeviceFlags(unsigned f) { device_flags = (int)f; return status; }
int cudaSetDevice(int d) { return status ? status : d != 0; }
int cudaDeviceGetAttribute(int *v, int which, int d) { (void)d; *v = which == 75 ? 8 : which == 76 ? 7 : which == 16 ? 14 : integrated; return status; }
int cudaGetDeviceProperties(void *p, int d) { (void)d; memset(p, 0, 700); strcpy(p, GPU_NAME); return status; }
int cudaMemGetInfo(size_t *free, size_t *total) { *free = (size_t)(3000 - streams * stream_mib) << 20; *total = (size_t)8000 << 20; return status; }
int cudaRuntimeGetVersion(int *v) { *v = 12060; return 0; }
int cudaDriverGetVersion(int *v) { *v = status ? 0 : 12080; return 0; }
int cudaMalloc(void **p, size_t n) { if (n > (size_t)1 << 32) return 2; *p = calloc(1, n); live++; return 0; }
int cudaFree(void *p) { free(p); live--; return 0; }
int cudaMallocHost(void **p, size_t n) { *p = calloc(1, n); live++; return 0; }
int cudaFreeHost(void *p) { free(p); live--; return 0; }
int cudaMemcpyAsync(void *dst, const void *src, size_t n, int way, void *s) { return give(s, (op){way, dst, src, n, NULL}); }
int cudaStreamCreateWithFlags(void **s, unsigned f) { (void)f; if ((streams + 1) * stream_mib > 3000) return 2; *s = calloc(1, sizeof(stream)); live++; streams++; return 0; }
int cudaStreamDestroy(void *s) { free(s); live--; streams--; return 0; }
int cudaStreamSynchronize(void *s) { return ((stream *)s)->captured ? 900 : 0; }
int cudaEventCreateWithFlags(void **e, unsigned f) { (void)f; *e = calloc(1, sizeof(event)); live++; return 0; }
int cudaEventDestroy(void *e) { free(e); live--; return 0; }
int cudaEventRecord(void *e, void *s) { (void)s; ((event *)e)->ns = now(); return 0; }
int cudaEventSynchronize(void *e) { (void)e; return 0; }
int cudaEventElapsedTime(float *ms, void *a, void *b) { *ms = (float)((((event *)b)->ns - ((event *)a)->ns) * 1e-6); return 0; }
int cudaStreamBeginCapture(void *s, int mode) { (void)mode; if (fails_capture) return 906; ((stream *)s)->captured = calloc(1, sizeof(graph)); return 0; }
int cudaStreamEndCapture(void *s, void **g) { *g = ((stream *)s)->captured; ((stream *)s)->captured = NULL; live++; return 0; }
int cudaGraphLaunch(void *g, void *s) { (void)s; graph_launches++; for (op *o = ((graph *)g)->first; o; o = o->next) run(o); return 0; }
int cudaGraphDestroy(void *g) { (void)g; live--; return 0; }
int cudaGraphExecDestroy(void *g) { (void)g; live--; return 0; }
#ifdef OLD
int cudaGraphInstantiate(void **x, void *g, void *node, char *log, size_t n) { (void)node; (void)log; if (n) return 1; *x = g; live++; return 0; }
#else
int cudaGraphInstantiateWithFlags(void **x, void *g, unsigned long long f) { if (f) return 1; *x = g; live++; return 0; }
#endif
const char *cudaGetErrorName(int s) { return s == 35 ? "cudaErrorInsufficientDriver" : s == 100 ? "cudaErrorNoDevice" : s == 2 ? "cudaErrorMemoryAllocation" : s == 906 ? "cudaErrorStreamCaptureImplicit" : "cudaErrorUnknown"; }
const char *cudaGetErrorString(int s) { return s == 35 ? "CUDA driver version is insufficient for CUDA runtime version" : s == 100 ? "no CUDA-capable device is detected" : s == 2 ? "out of memory" : "unknown error"; }
