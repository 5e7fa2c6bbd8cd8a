// A libcufile for tests: reads with pread(2) to the "GPU's" memory, which is the stand-in's and so the
// host's, as strictly as NVIDIA's may, and fails when it is told to.

#define _GNU_SOURCE
#include <errno.h>
#include <sched.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

typedef struct { int err; int cu_err; } Status;
typedef struct { int type; union { int fd; void *handle; } handle; const void *ops; } Description;
typedef struct { int fd; } File;

enum { PAGE = 4096, BUFFERS = 256 };

// What a test sets and gets, by name.
static struct { const char *name; atomic_long value; } settings[] = {
    {"open_fails", 0},      // with this code
    {"file_refused", 0},    // registration of a file, with this code
    {"buffer_refused", 0},  // of a buffer
    {"needs_compat", 0},    // reads need the compatibility mode
    {"short_bytes", 0},     // no read gives more
    {"fail_after", 0},      // this many reads go well, the one after fails with ...
    {"fail_errno", 0},      // ... this errno,
    {"fail_code", 0},       // or this code
    {"interrupt", 0},       // this many reads fail with EINTR
    {"hold", 0},            // reads wait
    {"compat", 1},          // the mode
    {"p2pdma", 0},
    {"opened", 0},
    {"opens", 0},
    {"closes", 0},
    {"files", 0},           // registered now
    {"buffers", 0},
    {"reads", 0},
    {"bytes", 0},
    {"waiting", 0},         // reads that wait
};

static atomic_long *at(const char *name) {
    for (size_t i = 0; i < sizeof settings / sizeof *settings; i++)
        if (strcmp(settings[i].name, name) == 0) return &settings[i].value;
    abort();
}

void stub_set(const char *name, long value) { atomic_store(at(name), value); }
long stub_get(const char *name) { return atomic_load(at(name)); }

static struct { atomic_uintptr_t base; atomic_size_t bytes; } buffers[BUFFERS];

static Status status(long code) { return (Status){(int)code, 0}; }

Status cuFileDriverOpen(void) {
    long code = stub_get("open_fails");
    if (code) return status(code);
    if (atomic_exchange(at("opened"), 1)) return status(5026);
    atomic_fetch_add(at("opens"), 1);
    return status(0);
}

Status CLOSE(void) {
    // With something registered, what follows would be undefined.
    if (!stub_get("opened") || stub_get("files") || stub_get("buffers")) abort();
    stub_set("opened", 0);
    atomic_fetch_add(at("closes"), 1);
    return status(0);
}

#ifndef OLD
Status cuFileSetParameterBool(int parameter, bool value) {
    if (stub_get("opened")) return status(5026);
    if (parameter == 1) stub_set("compat", value);
    else if (parameter == 7) stub_set("p2pdma", value);
    else return status(5022);
    return status(0);
}
#endif

Status cuFileHandleRegister(void **handle, Description *description) {
    if (!stub_get("opened")) return status(5001);
    if (stub_get("file_refused")) return status(stub_get("file_refused"));
    if (description->type != 1 || description->ops) return status(5022);
    File *file = malloc(sizeof *file);
    file->fd = description->handle.fd;
    *handle = file;
    atomic_fetch_add(at("files"), 1);
    return status(0);
}

void cuFileHandleDeregister(void *handle) {
    free(handle);
    atomic_fetch_sub(at("files"), 1);
}

Status cuFileBufRegister(const void *base, size_t bytes, int flags) {
    if (!stub_get("opened")) return status(5001);
    if (stub_get("buffer_refused")) return status(stub_get("buffer_refused"));
    if (flags || (uintptr_t)base % 65536) return status(5022);
    for (int i = 0; i < BUFFERS; i++) {
        uintptr_t none = 0;
        if (atomic_compare_exchange_strong(&buffers[i].base, &none, (uintptr_t)base)) {
            atomic_store(&buffers[i].bytes, bytes);
            atomic_fetch_add(at("buffers"), 1);
            return status(0);
        }
    }
    return status(5030);
}

Status cuFileBufDeregister(const void *base) {
    for (int i = 0; i < BUFFERS; i++) {
        uintptr_t known = (uintptr_t)base;
        if (atomic_compare_exchange_strong(&buffers[i].base, &known, 0)) {
            atomic_fetch_sub(at("buffers"), 1);
            return status(0);
        }
    }
    return status(5024);
}

static size_t registered(uintptr_t base) {
    for (int i = 0; i < BUFFERS; i++)
        if (atomic_load(&buffers[i].base) == base) return atomic_load(&buffers[i].bytes);
    return 0;
}

ssize_t cuFileRead(void *handle, void *base, size_t bytes, off_t offset, off_t to) {
    while (stub_get("hold")) {
        stub_set("waiting", 1);
        sched_yield();
    }
    if (stub_get("needs_compat") && !stub_get("compat")) return -5008;
    if (offset % PAGE || to % PAGE || (size_t)to + bytes > registered((uintptr_t)base)) return -5022;
    if (atomic_fetch_sub(at("interrupt"), 1) > 0) {
        errno = EINTR;
        return -1;
    }
    long nth = atomic_fetch_add(at("reads"), 1);
    if (nth == stub_get("fail_after")) {
        if (stub_get("fail_code")) return -stub_get("fail_code");
        errno = (int)stub_get("fail_errno");
        if (errno) return -1;
    }
    size_t most = (size_t)stub_get("short_bytes");
    if (most && bytes > most) bytes = most;
    // Whole blocks, for files that are open for direct I/O. Buffers end with one.
    size_t whole = (bytes + PAGE - 1) / PAGE * PAGE;
    ssize_t got = pread(((File *)handle)->fd, (char *)base + to, whole, offset);
    if (got > (ssize_t)bytes) got = (ssize_t)bytes;
    if (got > 0) atomic_fetch_add(at("bytes"), got);
    return got;
}
