/* Writes down every change that a program makes below one folder, in order, with the bytes.

   Loaded before the C library (LD_PRELOAD). It begins when the program calls cofuse_recorder_start,
   or at once when the environment says
     COFUSE_RECORDER_ROOT  the folder, empty at the start
     COFUSE_RECORDER_LOG   the file of records, outside of it
     COFUSE_RECORDER_FAIL  "NUMBER ERRNO": the NUMBER-th change (from 0) fails with ERRNO. ENOSPC
                           goes on for whatever needs room until cofuse_recorder_heal(), and the
                           first write it meets is cut in half; any other comes once.
   A record is the struct below, then its paths (relative to the folder) and its data; its kinds are
   Kind in reliability_disk.py. Files are named by inode, so a record needs no table of handles.
   The change and its record are one step under a lock: the log's order is the order on the disk.
   Children of the process are not recorded. The system is called directly: nothing here calls a
   function that is replaced here. */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <pthread.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <unistd.h>

struct record {
    uint8_t kind, pad;
    uint16_t path, other; /* lengths, bytes */
    uint16_t pad2;
    uint32_t data;   /* bytes that follow the paths */
    uint32_t number; /* of the change, from 0 */
    uint64_t file, offset;
};
typedef char path_t[PATH_MAX];

static pthread_mutex_t turn = PTHREAD_MUTEX_INITIALIZER;
static path_t root;
static size_t root_length;
static int log_handle = -1;
static pid_t recorded;
static long changes, fail_at;
static int fail_with, cut;

/* A path below the folder, and what lies there. */
struct place {
    path_t full;
    const char *name; /* the part of `full` after the folder */
    struct stat status;
};

static void put_all(const void *data, size_t length) {
    for (const char *at = data; length > 0;) {
        ssize_t done = syscall(SYS_write, log_handle, at, length);
        if (done <= 0) abort(); /* a log with a hole would lie */
        at += done, length -= done;
    }
}

/* Append one record; data comes as `count` parts, of which `length` bytes in all. */
static void put(char kind, uint64_t file, uint64_t offset, const char *path, const char *other,
                const struct iovec *parts, size_t length) {
    int before = errno;
    struct record head = {.kind = kind, .path = strlen(path), .other = strlen(other),
                          .data = length, .number = changes - 1, .file = file, .offset = offset};
    put_all(&head, sizeof head);
    put_all(path, head.path);
    put_all(other, head.other);
    for (; length > 0; parts++) {
        size_t part = parts->iov_len < length ? parts->iov_len : length;
        put_all(parts->iov_base, part);
        length -= part;
    }
    errno = before;
}

static void put_name(char kind, const struct place *at) {
    put(kind, at->status.st_ino, 0, at->name, "", NULL, 0);
}

static int active(void) { return log_handle >= 0 && getpid() == recorded; }

/* The path relative to the folder; NULL when it is not below it. */
static const char *below(const char *path) {
    if (strncmp(path, root, root_length) != 0) return NULL;
    if (path[root_length] == '/') return path + root_length + 1;
    return path[root_length] ? NULL : "";
}

static int link_of(int handle, path_t found) {
    char name[40];
    snprintf(name, sizeof name, "/proc/self/fd/%d", handle);
    ssize_t length = readlink(name, found, PATH_MAX - 1);
    found[length < 0 ? 0 : length] = 0;
    return length >= 0;
}

/* Whether an open file or folder is below the root, and which. */
static int tracked(int handle, struct place *at) {
    return active() && link_of(handle, at->full) && (at->name = below(at->full)) &&
           !fstat(handle, &at->status) &&
           (S_ISREG(at->status.st_mode) || S_ISDIR(at->status.st_mode));
}

/* The same for a path, of which the last part need not exist. */
static int resolve(int folder, const char *path, struct place *at) {
    path_t joined, parent;
    if (!active()) return 0;
    if (path[0] == '/') {
        snprintf(joined, PATH_MAX, "%s", path);
    } else {
        if (folder == AT_FDCWD ? !getcwd(parent, PATH_MAX) : !link_of(folder, parent)) return 0;
        if (snprintf(joined, PATH_MAX, "%s/%s", parent, path) >= PATH_MAX) return 0;
    }
    for (size_t n = strlen(joined); n > 1 && joined[n - 1] == '/';) joined[--n] = 0;
    char *name = strrchr(joined, '/');
    *name++ = 0;
    if (!realpath(joined[0] ? joined : "/", parent)) return 0;
    if (snprintf(at->full, PATH_MAX, "%s/%s", parent, name) >= PATH_MAX) return 0;
    return (at->name = below(at->full)) != NULL;
}

/* Count a change; when it is to fail, note that and return its errno. */
static int refused(char kind) {
    long number = changes++;
    if (!fail_with || number < fail_at) return 0;
    if (fail_with == ENOSPC && !strchr("cdlrw", kind)) return 0;
    errno = fail_with;
    struct iovec what = {&kind, 1};
    put('!', 0, 0, "", "", &what, 1);
    if (fail_with != ENOSPC) fail_with = 0;
    return errno;
}

/* Record this process from now on. Args: as in the environment; error 0: nothing fails. */
void cofuse_recorder_start(const char *folder, const char *log, long at, int error) {
    int flags = O_WRONLY | O_CREAT | O_APPEND | O_CLOEXEC;
    struct place top = {.name = ""};
    if (!realpath(folder, root) || stat(root, &top.status)) return;
    root_length = strlen(root);
    recorded = getpid();
    fail_at = at, fail_with = error;
    log_handle = syscall(SYS_openat, AT_FDCWD, log, flags, 0600);
    if (log_handle >= 0) put_name('d', &top);
}

__attribute__((constructor)) static void start(void) {
    const char *folder = getenv("COFUSE_RECORDER_ROOT"), *log = getenv("COFUSE_RECORDER_LOG");
    const char *fail = getenv("COFUSE_RECORDER_FAIL");
    long at = 0;
    int error = 0;
    unsetenv("LD_PRELOAD");
    if (fail) sscanf(fail, "%ld %d", &at, &error);
    if (folder && log) cofuse_recorder_start(folder, log, at, error);
}

/* For the recorded program itself: a line of its own between the changes. */
void cofuse_recorder_mark(const char *text) {
    struct iovec line = {(void *)text, strlen(text)};
    pthread_mutex_lock(&turn);
    if (active()) put('m', 0, 0, "", "", &line, line.iov_len);
    pthread_mutex_unlock(&turn);
}

/* There is room again. */
void cofuse_recorder_heal(void) { fail_with = 0; }

/* --- names --------------------------------------------------------------------------------- */

static int open_at(int folder, const char *path, int flags, mode_t mode) {
    struct place at;
    if (!(flags & (O_CREAT | O_TRUNC)) || !resolve(folder, path, &at))
        return syscall(SYS_openat, folder, path, flags, mode);
    pthread_mutex_lock(&turn);
    int there = !lstat(at.full, &at.status), handle = -1;
    char kind = there ? (flags & O_TRUNC ? 't' : 0) : (flags & O_CREAT ? 'c' : 0);
    if ((flags & O_EXCL) && there) kind = 0;
    if (!kind || !refused(kind)) handle = syscall(SYS_openat, folder, path, flags, mode);
    if (kind && handle >= 0 && !fstat(handle, &at.status)) put_name(kind, &at);
    pthread_mutex_unlock(&turn);
    return handle;
}

static int open_any(int folder, const char *path, int flags, va_list rest) {
    return open_at(folder, path, flags, flags & (O_CREAT | O_TMPFILE) ? va_arg(rest, mode_t) : 0);
}
#define OPEN(NAME, PARAMETERS, FOLDER)              \
    int NAME PARAMETERS {                           \
        va_list rest;                               \
        va_start(rest, flags);                      \
        int handle = open_any(FOLDER, path, flags, rest); \
        va_end(rest);                               \
        return handle;                              \
    }
OPEN(open, (const char *path, int flags, ...), AT_FDCWD)
OPEN(openat, (int folder, const char *path, int flags, ...), folder)
int creat(const char *path, mode_t mode) {
    return open_at(AT_FDCWD, path, O_CREAT | O_WRONLY | O_TRUNC, mode);
}

int mkdirat(int folder, const char *path, mode_t mode) {
    struct place at;
    if (!resolve(folder, path, &at) || !lstat(at.full, &at.status))
        return syscall(SYS_mkdirat, folder, path, mode);
    pthread_mutex_lock(&turn);
    int failed = refused('d') ? -1 : syscall(SYS_mkdirat, folder, path, mode);
    if (!failed && !lstat(at.full, &at.status)) put_name('d', &at);
    pthread_mutex_unlock(&turn);
    return failed;
}
int mkdir(const char *path, mode_t mode) { return mkdirat(AT_FDCWD, path, mode); }

int unlinkat(int folder, const char *path, int flags) {
    struct place at;
    if (!resolve(folder, path, &at) || lstat(at.full, &at.status))
        return syscall(SYS_unlinkat, folder, path, flags);
    pthread_mutex_lock(&turn);
    int failed = refused('u') ? -1 : syscall(SYS_unlinkat, folder, path, flags);
    if (!failed) put_name('u', &at);
    pthread_mutex_unlock(&turn);
    return failed;
}
int unlink(const char *path) { return unlinkat(AT_FDCWD, path, 0); }
int rmdir(const char *path) { return unlinkat(AT_FDCWD, path, AT_REMOVEDIR); }

/* A second name, or another name; from or to elsewhere, and flags, are not understood. */
static int name_again(char kind, int folder, const char *from, int target, const char *to,
                      int flags) {
    struct place old, new;
    long call = kind == 'r' ? SYS_renameat2 : SYS_linkat;
    int here = resolve(folder, from, &old), there = resolve(target, to, &new);
    if (!here && !there) return syscall(call, folder, from, target, to, flags);
    pthread_mutex_lock(&turn);
    int failed = refused(kind) ? -1 : syscall(call, folder, from, target, to, flags);
    if (!failed && here && there && !flags && !lstat(new.full, &new.status))
        put(kind, new.status.st_ino, 0, old.name, new.name, NULL, 0);
    else if (!failed)
        put('?', 0, 0, here ? old.name : new.name, "", NULL, 0);
    pthread_mutex_unlock(&turn);
    return failed;
}
int renameat2(int folder, const char *from, int target, const char *to, unsigned flags) {
    return name_again('r', folder, from, target, to, flags);
}
int renameat(int folder, const char *from, int target, const char *to) {
    return name_again('r', folder, from, target, to, 0);
}
int rename(const char *from, const char *to) {
    return name_again('r', AT_FDCWD, from, AT_FDCWD, to, 0);
}
int linkat(int folder, const char *from, int target, const char *to, int flags) {
    return name_again('l', folder, from, target, to, flags);
}
int link(const char *from, const char *to) {
    return name_again('l', AT_FDCWD, from, AT_FDCWD, to, 0);
}

/* --- bytes --------------------------------------------------------------------------------- */

/* Write parts at `offset`, or at the handle's own position when it is -1. */
static ssize_t write_parts(int handle, const struct iovec *parts, int count, off_t offset) {
    struct place at;
    struct iovec half = parts[0];
    int known = tracked(handle, &at), error = 0;
    ssize_t done = -1;
    if (known) {
        pthread_mutex_lock(&turn);
        error = refused('w');
        if (error == ENOSPC && !cut && half.iov_len > 1) {
            half.iov_len /= 2, parts = &half, count = 1, cut = 1, error = 0;
        }
    }
    if (!error)
        done = offset < 0 ? syscall(SYS_writev, handle, parts, count)
                          : syscall(SYS_pwritev, handle, parts, count, offset, 0);
    if (!known) return done;
    off_t start = offset < 0 ? lseek(handle, 0, SEEK_CUR) - done : offset;
    if (done > 0) put('w', at.status.st_ino, start, "", "", parts, done);
    pthread_mutex_unlock(&turn);
    return done;
}
ssize_t write(int handle, const void *data, size_t length) {
    struct iovec part = {(void *)data, length};
    return write_parts(handle, &part, 1, -1);
}
ssize_t writev(int handle, const struct iovec *parts, int count) {
    return write_parts(handle, parts, count, -1);
}
ssize_t pwrite(int handle, const void *data, size_t length, off_t offset) {
    struct iovec part = {(void *)data, length};
    return write_parts(handle, &part, 1, offset);
}
ssize_t pwritev(int handle, const struct iovec *parts, int count, off_t offset) {
    return write_parts(handle, parts, count, offset);
}
ssize_t pwritev2(int handle, const struct iovec *parts, int count, off_t offset, int flags) {
    (void)flags; /* hints only */
    return write_parts(handle, parts, count, offset);
}

int ftruncate(int handle, off_t length) {
    struct place at;
    if (!tracked(handle, &at)) return syscall(SYS_ftruncate, handle, length);
    pthread_mutex_lock(&turn);
    int failed = refused('t') ? -1 : syscall(SYS_ftruncate, handle, length);
    if (!failed) put('t', at.status.st_ino, length, "", "", NULL, 0);
    pthread_mutex_unlock(&turn);
    return failed;
}
int truncate(const char *path, off_t length) {
    int handle = syscall(SYS_openat, AT_FDCWD, path, O_WRONLY | O_CLOEXEC, 0);
    if (handle < 0) return -1;
    int failed = ftruncate(handle, length), error = errno;
    close(handle);
    errno = error;
    return failed;
}

static int sync_one(int handle, long call) {
    struct place at;
    if (!tracked(handle, &at)) return syscall(call, handle);
    pthread_mutex_lock(&turn);
    int failed = refused('f') ? -1 : syscall(call, handle);
    put_name(failed ? 'e' : 'f', &at);
    pthread_mutex_unlock(&turn);
    return failed;
}
int fsync(int handle) { return sync_one(handle, SYS_fsync); }
int fdatasync(int handle) { return sync_one(handle, SYS_fdatasync); }
void sync(void) { /* noted, not done: it would wait for every disk of the machine */
    pthread_mutex_lock(&turn);
    if (active()) put('s', 0, 0, "", "", NULL, 0);
    pthread_mutex_unlock(&turn);
}

/* --- ways around a write: refused, as some file systems do; programs then write plainly ---- */

static int outside(int handle) {
    struct place at;
    if (!tracked(handle, &at)) return 1;
    errno = EINVAL;
    return 0;
}
ssize_t sendfile(int out, int in, off_t *offset, size_t length) {
    return outside(out) ? syscall(SYS_sendfile, out, in, offset, length) : -1;
}
ssize_t copy_file_range(int in, off64_t *from, int out, off64_t *to, size_t length,
                        unsigned flags) {
    return outside(out) ? syscall(SYS_copy_file_range, in, from, out, to, length, flags) : -1;
}
int fallocate(int handle, int mode, off_t offset, off_t length) {
    return outside(handle) ? syscall(SYS_fallocate, handle, mode, offset, length) : -1;
}
int posix_fallocate(int handle, off_t offset, off_t length) {
    return fallocate(handle, 0, offset, length) ? errno : 0;
}

/* Writes through memory cannot be seen: the model refuses a log with them (save SQLite's -shm). */
void *mmap(void *where, size_t length, int protection, int flags, int handle, off_t offset) {
    struct place at;
    if ((protection & PROT_WRITE) && (flags & MAP_SHARED) && tracked(handle, &at)) {
        pthread_mutex_lock(&turn);
        put_name('?', &at);
        pthread_mutex_unlock(&turn);
    }
    return (void *)syscall(SYS_mmap, where, length, protection, flags, handle, offset);
}

/* On 64-bit systems both names of a call take the same arguments. */
#define ALSO(NAME, OTHER) extern __typeof__(NAME) OTHER __attribute__((alias(#NAME)))
ALSO(open, open64);
ALSO(openat, openat64);
ALSO(creat, creat64);
ALSO(pwrite, pwrite64);
ALSO(pwritev, pwritev64);
ALSO(pwritev2, pwritev64v2);
ALSO(ftruncate, ftruncate64);
ALSO(truncate, truncate64);
ALSO(sendfile, sendfile64);
ALSO(fallocate, fallocate64);
ALSO(posix_fallocate, posix_fallocate64);
ALSO(mmap, mmap64);
