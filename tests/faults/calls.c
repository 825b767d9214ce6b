// A layer below a process (LD_PRELOAD) whose calls on files of one folder fail: the N-th one with an error number, or with a kill.
//   fault_set(n, error)   the n-th call from now on; error 0: SIGKILL. n = 0: none.
//   fault_count()         calls so far.
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdarg.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/uio.h>
#include <unistd.h>

static long at = 0, seen = 0;
static int number = 0;
static char ours[4096];

void fault_set(long n, int error) { at = n, seen = 0, number = error; }
long fault_count(void) { return seen; }

static int fails(void) {
    if (++seen != at) return 0;
    if (number == 0) kill(getpid(), SIGKILL);
    errno = number;
    return 1;
}
static int is_ours(const char *path) {
    const char *folder = getenv("FAULTY_FOLDER");
    return folder && path && strstr(path, folder);
}
#define OPEN(name)                                                                   \
    int name(const char *path, int flags, ...) {                                     \
        va_list rest; va_start(rest, flags); mode_t mode = va_arg(rest, mode_t);     \
        int (*real)(const char *, int, ...) = dlsym(RTLD_NEXT, #name);               \
        if (is_ours(path) && fails()) return -1;                                     \
        int fd = real(path, flags, mode);                                            \
        if (fd >= 0 && fd < (int)sizeof ours) ours[fd] = is_ours(path) != 0;         \
        return fd;                                                                   \
    }
#define OPENAT(name)                                                                 \
    int name(int folder, const char *path, int flags, ...) {                         \
        va_list rest; va_start(rest, flags); mode_t mode = va_arg(rest, mode_t);     \
        int (*real)(int, const char *, int, ...) = dlsym(RTLD_NEXT, #name);          \
        int of_ours = is_ours(path) || (folder >= 0 && folder < (int)sizeof ours && ours[folder]); \
        if (of_ours && fails()) return -1;                                           \
        int fd = real(folder, path, flags, mode);                                    \
        if (fd >= 0 && fd < (int)sizeof ours) ours[fd] = of_ours;                    \
        return fd;                                                                   \
    }
#define OF_FILE(type, name, parameters, arguments)                                   \
    type name parameters {                                                           \
        type (*real) parameters = dlsym(RTLD_NEXT, #name);                           \
        if (fd >= 0 && fd < (int)sizeof ours && ours[fd] && fails()) return -1;      \
        return real arguments;                                                       \
    }
#define OF_PATH(name, parameters, arguments)                                         \
    int name parameters {                                                            \
        int (*real) parameters = dlsym(RTLD_NEXT, #name);                            \
        if (is_ours(path) && fails()) return -1;                                     \
        return real arguments;                                                       \
    }
OPEN(open)
OPEN(open64)
OPENAT(openat)
OPENAT(openat64)
OF_FILE(ssize_t, write, (int fd, const void *data, size_t size), (fd, data, size))
OF_FILE(ssize_t, writev, (int fd, const struct iovec *parts, int count), (fd, parts, count))
OF_FILE(ssize_t, pwrite64, (int fd, const void *data, size_t size, off64_t place), (fd, data, size, place))
OF_FILE(int, ftruncate64, (int fd, off64_t size), (fd, size))
OF_FILE(int, fsync, (int fd), (fd))
OF_FILE(int, fdatasync, (int fd), (fd))
OF_FILE(int, close, (int fd), (fd))
OF_FILE(int, unlinkat, (int fd, const char *path, int flags), (fd, path, flags))
OF_PATH(mkdir, (const char *path, mode_t mode), (path, mode))
OF_PATH(rmdir, (const char *path), (path))
OF_PATH(unlink, (const char *path), (path))
OF_PATH(rename, (const char *path, const char *to), (path, to))
