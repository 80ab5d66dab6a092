// LD_PRELOAD로 끼워, 정해진 폴더에 n번째로 쓰는 순간에 디스크를 채우거나 프로세스를 죽인다.
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <limits.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/types.h>
#include <sys/uio.h>
#include <unistd.h>

enum { COUNT, FULL, KILL };
static int mode = COUNT;
static long target = -1, seen = 0;
static char folder[PATH_MAX];

void fault_arm(const char *path, int how, long at) {
    snprintf(folder, sizeof folder, "%s", path);
    mode = how, target = at, seen = 0;
}

long fault_count(void) { return seen; }

static int inside(const char *path) { return folder[0] && strncmp(path, folder, strlen(folder)) == 0; }

static int fd_inside(int fd) {
    char link[64], path[PATH_MAX];
    if (!folder[0]) return 0;
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    ssize_t n = readlink(link, path, sizeof path - 1);
    if (n < 0) return 0;
    path[n] = 0;
    return inside(path);
}

// 쓰기 하나. 찬 디스크는 그 뒤로도 차 있다. 걸린 쓰기는 절반만 쓰인다.
static int strikes(void) {
    long now = seen++;
    if (mode == COUNT || target < 0 || now < target) return 0;
    return now == target ? 1 : mode == FULL ? 2 : 0;
}

#define REAL(name) static __typeof__(&name) real; if (!real) real = (__typeof__(&name))dlsym(RTLD_NEXT, #name)

ssize_t write(int fd, const void *data, size_t n) {
    REAL(write);
    int hit = fd_inside(fd) ? strikes() : 0;
    if (!hit) return real(fd, data, n);
    if (hit == 1 && n > 1) {
        ssize_t half = real(fd, data, n / 2);
        if (mode == KILL) raise(SIGKILL);
        return half;
    }
    if (mode == KILL) raise(SIGKILL);
    errno = ENOSPC;
    return -1;
}

ssize_t writev(int fd, const struct iovec *parts, int n) {
    REAL(writev);
    if (!fd_inside(fd) || !strikes()) return real(fd, parts, n);
    if (mode == KILL) raise(SIGKILL);
    errno = ENOSPC;
    return -1;
}

ssize_t pwrite64(int fd, const void *data, size_t n, off64_t at) {
    REAL(pwrite64);
    if (!fd_inside(fd) || !strikes()) return real(fd, data, n, at);
    if (mode == KILL) raise(SIGKILL);
    errno = ENOSPC;
    return -1;
}

int mkdir(const char *path, mode_t bits) {
    REAL(mkdir);
    if (!inside(path) || !strikes()) return real(path, bits);
    if (mode == KILL) raise(SIGKILL);
    errno = ENOSPC;
    return -1;
}

int fsync(int fd) {
    REAL(fsync);
    if (mode == KILL && fd_inside(fd) && strikes()) raise(SIGKILL);
    return real(fd);
}

int rename(const char *from, const char *to) {
    REAL(rename);
    if (mode != FULL && inside(to) && strikes()) raise(SIGKILL);
    return real(from, to);
}

int unlinkat(int dir, const char *path, int flags) {
    REAL(unlinkat);
    if (mode == KILL && fd_inside(dir) && strikes()) raise(SIGKILL);
    return real(dir, path, flags);
}
