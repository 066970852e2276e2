/* The agent of a sandbox: runs commands and file operations for the host over one stream of frames (the wire is
 * described in protocol.py). It is PID 1 of a container, or a service of a machine, and reaps what is orphaned.
 *
 *   agent --listen FD [--drop] [--wall FOLDER] [--filter FILE]   a listening unix socket, inherited; the newest connection wins
 *   agent --device PATH            a serial or virtio port, or "-": standard input; the host opens a session with MAGIC, which
 *                                  is echoed; or "vsock:PORT", to listen there for the host and nobody else
 *
 * --drop: commands get no capability and no way back to one (containers; in a machine root stays root). --wall:
 * nothing outside the folder can be opened (walls.h). --filter: the system call filter, where who started us had none.
 * What it runs is hostile, so it trusts no file of the sandbox; what it answers is not believed by the host either. */
#define _GNU_SOURCE
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <ftw.h>
#include <grp.h>
#include <linux/capability.h>
#include <linux/filter.h>
#include <linux/openat2.h>
#include <linux/vm_sockets.h>
#include <poll.h>
#include <signal.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/fsuid.h>
#include <sys/ioctl.h>
#include <sys/prctl.h>
#include <sys/signalfd.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <termios.h>
#include <time.h>
#include <unistd.h>

enum { VERSION = 3, MAX_FRAME = 1 << 20, MAX_EXEC = 4 << 20, PIECE = 1 << 16, BUSY = 1 << 18 };
static const char MAGIC[] = "\x93""dsec\x1f""open\xe7\x0a\x5b\xc2\x80"; /* 16 bytes with the final NUL */

struct buf { char *p; size_t n, cap; };
struct keep { struct buf head, tail; size_t at; uint64_t total; }; /* tail is a ring once it is full; at: its start */
struct proc {
    struct proc *next;
    uint32_t id;
    long step;
    pid_t pid;
    int in, out[2], tty, shut, streaming, exited, done, forgotten, code, sig;
    size_t limit;
    double started, seconds;
    unsigned long long ticks; /* since boot, as /proc tells of processes */
    struct buf stdin_left;
    struct keep kept[2];
};

static struct proc *procs;
static struct buf in, out, more; /* more: the first frames of a long exec */
static uint32_t more_id;
static int listener = -1, conn = -1, device, drop_caps;
static const char *device_path;
extern char **environ;

static void die(const char *what) { dprintf(2, "agent: %s: %s\n", what, strerror(errno)); _exit(1); }

static double now(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return t.tv_sec + t.tv_nsec / 1e9;
}

static void put(struct buf *b, const void *p, size_t n) {
    if (b->n + n > b->cap) {
        b->cap = (b->n + n) * 2 < 256 ? 256 : (b->n + n) * 2;
        if (!(b->p = realloc(b->p, b->cap))) die("memory");
    }
    memcpy(b->p + b->n, p, n);
    b->n += n;
}

static void cut(struct buf *b, size_t n) { /* drops the first n bytes; gives the memory back when nothing is left */
    b->n -= n;
    if (b->n) memmove(b->p, b->p + n, b->n);
    else { free(b->p); memset(b, 0, sizeof *b); }
}

static void header(char kind, uint32_t id, uint32_t n) {
    char head[9];
    n += 5;
    memcpy(head, &n, 4); head[4] = kind; memcpy(head + 5, &id, 4); /* little-endian machines only */
    put(&out, head, 9);
}

static void reply(char kind, uint32_t id, const void *p, size_t n) {
    if (conn < 0) return;
    header(kind, id, n);
    put(&out, p, n);
}

static void field(struct buf *b, const char *key, const char *format, ...) {
    char text[512];
    va_list args;
    va_start(args, format);
    int n = vsnprintf(text, sizeof text, format, args);
    va_end(args);
    put(b, key, strlen(key) + 1);
    put(b, text, (n < (int)sizeof text ? n : (int)sizeof text - 1) + 1);
}

static void refuse(uint32_t id, int number, const char *text) {
    struct buf b = {0};
    field(&b, "errno", "%d", number);
    field(&b, "text", "%s", text);
    reply('F', id, b.p, b.n);
    free(b.p);
}

/* Kept output: the first half of the limit as it came, the last half in a ring. */

static void keep(struct proc *p, int which, const char *data, size_t n) {
    struct keep *k = &p->kept[which];
    size_t half = p->limit / 2, room = half - k->head.n;
    k->total += n;
    size_t first = n < room ? n : room;
    if (first) {
        put(&k->head, data, first);
        if (p->streaming) reply(which ? 'E' : 'O', p->id, data, first);
    }
    data += first, n -= first;
    if (n > half) data += n - half, n = half;
    if (!n) return;
    size_t fill = half - k->tail.n < n ? half - k->tail.n : n;
    put(&k->tail, data, fill);
    for (data += fill, n -= fill; n;) {
        size_t run = half - k->at < n ? half - k->at : n;
        memcpy(k->tail.p + k->at, data, run);
        k->at = (k->at + run) % half;
        data += run, n -= run;
    }
}

static void pieces(char kind, uint32_t id, const char *p, size_t n) {
    for (size_t at = 0; at < n; at += PIECE) reply(kind, id, p + at, n - at < PIECE ? n - at : PIECE);
}

static void outcome(struct buf *b, struct proc *p) {
    field(b, "code", "%d", p->code);
    field(b, "signal", "%d", p->sig);
    field(b, "seconds", "%.6f", p->seconds);
    for (int i = 0; i < 2; i++)
        field(b, i ? "err" : "out", "%llu",
              (unsigned long long)(p->kept[i].total - p->kept[i].head.n - p->kept[i].tail.n));
}

static void tell_done(struct proc *p) {
    struct buf b = {0};
    for (int i = 0; i < 2; i++) {
        struct keep *k = &p->kept[i];
        pieces(i ? 'E' : 'O', p->id, k->tail.p + k->at, k->tail.n - k->at);
        pieces(i ? 'E' : 'O', p->id, k->tail.p, k->at);
    }
    outcome(&b, p);
    reply('D', p->id, b.p, b.n);
    free(b.p);
}

/* Commands */

static struct proc *find(uint32_t id) {
    for (struct proc *p = procs; p; p = p->next)
        if (p->id == id && !p->forgotten) return p;
    return NULL;
}

static void taken(struct proc *p, size_t n) { /* so many bytes of standard input are gone: the host may send as many more */
    uint32_t count = n;
    if (n && p->streaming) reply('i', p->id, &count, 4);
}

static void shut_stdin(struct proc *p) {
    taken(p, p->stdin_left.n);
    if (p->in >= 0 && !p->tty) close(p->in);
    p->in = -1;
    cut(&p->stdin_left, p->stdin_left.n);
}

static void feed(struct proc *p) { /* standard input, as much as its pipe takes */
    while (p->in >= 0 && p->stdin_left.n) {
        ssize_t n = write(p->in, p->stdin_left.p, p->stdin_left.n);
        if (n > 0) { cut(&p->stdin_left, n); taken(p, n); }
        else if (n < 0 && errno == EAGAIN) return;
        else { shut_stdin(p); return; }
    }
    if (p->in >= 0 && p->shut && !p->tty) shut_stdin(p);
}

static int pull(struct proc *p, int which) { /* one read of its output; 0 when there is no more for now */
    char data[PIECE];
    ssize_t n = read(p->out[which], data, sizeof data);
    if (n < 0 && errno == EAGAIN) return 0;
    if (n <= 0) { close(p->out[which]); if (p->in == p->out[which]) p->in = -1; p->out[which] = -1; return 0; }
    if (!p->done) keep(p, which, data, n); /* a daemon's output after its command ended goes nowhere */
    return 1;
}

static void finish(struct proc *p) {
    for (int i = 0; i < 2; i++) /* what the command itself wrote is in the pipe by now; a child may write for ever */
        for (int k = 0; k < 64 && p->out[i] >= 0 && pull(p, i); k++);
    shut_stdin(p);
    p->done = 1;
    if (p->streaming) tell_done(p);
}

static void reap(void) {
    int status;
    for (pid_t pid; (pid = waitpid(-1, &status, WNOHANG)) > 0;)
        for (struct proc *p = procs; p; p = p->next)
            if (p->pid == pid && !p->exited) {
                p->exited = 1;
                p->code = WIFEXITED(status) ? WEXITSTATUS(status) : 0;
                p->sig = WIFSIGNALED(status) ? WTERMSIG(status) : 0;
                p->seconds = now() - p->started;
                finish(p);
            }
}

static void sweep(void) { /* frees commands that are done, forgotten and silent */
    for (struct proc **at = &procs, *p; (p = *at);)
        if (p->done && p->forgotten && p->out[0] < 0 && p->out[1] < 0) {
            *at = p->next;
            for (int i = 0; i < 2; i++) free(p->kept[i].head.p), free(p->kept[i].tail.p);
            free(p);
        } else at = &p->next;
}

#include "tree.h"
#include "walls.h"
#include "watch.h"

struct request { char **argv, **env; int argc, envc, stdin_open, watch; const char *cwd, *shell, *tty; long uid, gid, step, limit; };

static int child(struct request *r, int fds[3], const char *slave) { /* returns errno */
    sigset_t none;
    sigemptyset(&none);
    setsid();
    if (slave) {
        int fd = open(slave, O_RDWR | O_CLOEXEC);
        if (fd < 0 || ioctl(fd, TIOCSCTTY, 0)) return errno;
        for (int i = 0; i < 3; i++) fds[i] = fd;
        if (r->uid && fchown(fd, r->uid, -1)) {}
    }
    for (int i = 0; i < 3; i++) if (dup2(fds[i], i) < 0) return errno;
    int fd = open("/proc/self/oom_score_adj", O_WRONLY | O_CLOEXEC); /* the agent is the last to go */
    if (fd >= 0) { if (write(fd, "500", 3) < 0) {} close(fd); }
    syscall(SYS_close_range, 3, ~0U, 4 /* CLOSE_RANGE_CLOEXEC */);
    gid_t gid = r->gid;
    if ((r->uid || r->gid) && (setgroups(r->gid ? 1 : 0, &gid) || setresgid(gid, gid, gid) || setresuid(r->uid, r->uid, r->uid)))
        return errno;
    if (drop_caps) no_capabilities();
    if (r->cwd ? chdir(r->cwd) : 0) return errno;
    signal(SIGPIPE, SIG_DFL);
    sigprocmask(SIG_SETMASK, &none, NULL);
    if (r->watch) return watch(r->watch > 1);
    char *shell[] = {access("/bin/bash", X_OK) ? "/bin/sh" : "/bin/bash", "-c", (char *)r->shell, NULL};
    if (r->shell) r->argv = shell;
    environ = r->env;
    execvp(r->argv[0], r->argv);
    return errno;
}

static void start(uint32_t id, char *data, size_t n) {
    struct request r = {calloc(n / 4 + 2, sizeof(char *)), calloc(n / 4 + 2, sizeof(char *)), .limit = 1 << 20};
    int pipes[3][2] = {{-1, -1}, {-1, -1}, {-1, -1}}, report[2], master = -1, error = 0, fds[3];
    char slave[64] = "";
    for (char *key = data, *end = data + n, *value; key < end; key = value + strlen(value) + 1) {
        if ((value = key + strlen(key) + 1) >= end) break;
        if (!strcmp(key, "arg")) r.argv[r.argc++] = value;
        else if (!strcmp(key, "env")) r.env[r.envc++] = value;
        else if (!strcmp(key, "shell")) r.shell = value;
        else if (!strcmp(key, "cwd")) r.cwd = value;
        else if (!strcmp(key, "tty")) r.tty = value;
        else if (!strcmp(key, "uid")) r.uid = atol(value);
        else if (!strcmp(key, "gid")) r.gid = atol(value);
        else if (!strcmp(key, "step")) r.step = atol(value);
        else if (!strcmp(key, "stdin")) r.stdin_open = atoi(value);
        else if (!strcmp(key, "limit")) r.limit = atol(value);
        else if (!strcmp(key, "watch")) r.watch = atoi(value);
    }
    if (find(id) || (!r.argc && !r.shell && !(r.watch && r.cwd)) || r.limit < 2) { error = EINVAL; goto out; }
    if (r.tty) {
        struct winsize size = {24, 80, 0, 0};
        sscanf(r.tty, "%hu %hu", &size.ws_row, &size.ws_col);
        if ((master = open("/dev/ptmx", O_RDWR | O_NOCTTY | O_CLOEXEC | O_NONBLOCK)) < 0 || unlockpt(master) ||
            ptsname_r(master, slave, sizeof slave)) { error = errno; goto out; }
        ioctl(master, TIOCSWINSZ, &size);
    } else {
        for (int i = 0; i < 3; i++) {
            if (i == 0 && !r.stdin_open) pipes[0][0] = open("/dev/null", O_RDONLY | O_CLOEXEC);
            else if (pipe2(pipes[i], O_CLOEXEC)) { error = errno; goto out; }
            fds[i] = pipes[i][i != 0];
            if (pipes[i][i == 0] >= 0) fcntl(pipes[i][i == 0], F_SETFL, O_NONBLOCK);
        }
    }
    if (pipe2(report, O_CLOEXEC)) { error = errno; goto out; }
    double started = now();
    struct timespec boot;
    clock_gettime(CLOCK_BOOTTIME, &boot);
    pid_t pid = fork();
    if (!pid) {
        int why = child(&r, fds, *slave ? slave : NULL);
        if (write(report[1], &why, sizeof why) < 0) {}
        _exit(127);
    }
    error = pid < 0 ? errno : 0;
    close(report[1]);
    if (!error && read(report[0], &error, sizeof error) > 0) waitpid(pid, NULL, 0);
    close(report[0]);
    if (error) goto out;
    struct proc *p = calloc(1, sizeof *p);
    if (!p) die("memory");
    *p = (struct proc){.next = procs, .id = id, .step = r.step, .pid = pid, .tty = !!r.tty, .streaming = 1, .limit = r.limit,
                       .started = started, .ticks = boot.tv_sec * sysconf(_SC_CLK_TCK) + boot.tv_nsec / (1000000000 / sysconf(_SC_CLK_TCK)),
                       .in = r.tty ? master : pipes[0][1], .out = {r.tty ? master : pipes[1][0], r.tty ? -1 : pipes[2][0]}};
    procs = p;
    master = pipes[0][1] = pipes[1][0] = pipes[2][0] = -1;
out:
    for (int i = 0; i < 6; i++) if (pipes[i / 2][i % 2] >= 0) close(pipes[i / 2][i % 2]);
    if (master >= 0) close(master);
    if (error) refuse(id, error, r.watch ? r.cwd : r.shell ? "shell" : r.argc ? r.argv[0] : "exec");
    free(r.argv); free(r.env);
}

/* Files: opened without following what /proc would lead elsewhere, and only regular ones are read or written */

static const char *get(char *data, size_t n, const char *key) {
    for (char *k = data, *v; k < data + n; k = v + strlen(v) + 1) {
        if ((v = k + strlen(k) + 1) >= data + n) break;
        if (!strcmp(k, key)) return v;
    }
    return "";
}

static int open_file(const char *path, int flags, mode_t mode) {
    struct open_how how = {.flags = flags | O_CLOEXEC | O_NONBLOCK | O_NOCTTY, .mode = mode, .resolve = RESOLVE_NO_MAGICLINKS};
    int fd = syscall(SYS_openat2, AT_FDCWD, path, &how, sizeof how);
    if (fd < 0 && errno == ENOSYS) fd = open(path, how.flags, mode);
    struct stat s;
    if (fd >= 0 && (fstat(fd, &s) || !S_ISREG(s.st_mode))) {
        errno = S_ISDIR(s.st_mode) ? EISDIR : EINVAL;
        int keep_errno = errno;
        close(fd);
        errno = keep_errno;
        return -1;
    }
    return fd;
}

static int make_dirs(const char *path, int last) { /* 0, or -1 with errno; last: the final part as well */
    char part[4096];
    size_t n = strlen(path);
    struct stat s;
    if (n >= sizeof part) { errno = ENAMETOOLONG; return -1; }
    for (size_t i = 1; i <= n; i++)
        if (path[i] == '/' || (path[i] == 0 && last)) {
            memcpy(part, path, i);
            part[i] = 0;
            int why = mkdir(part, 0755) ? errno : 0; /* refused where it is already there: no matter */
            if (why && why != EEXIST && stat(part, &s)) { errno = why; return -1; }
        }
    return last && (stat(path, &s) || !S_ISDIR(s.st_mode)) ? (errno = ENOTDIR, -1) : 0;
}

static void describe(struct buf *b, const char *name, struct stat *s) {
    put(b, name, strlen(name) + 1);
    char text[160];
    int n = snprintf(text, sizeof text, "%u %lld %u %u %lld.%09ld", s->st_mode, (long long)s->st_size, s->st_uid, s->st_gid,
                     (long long)s->st_mtim.tv_sec, s->st_mtim.tv_nsec);
    put(b, text, n + 1);
}

static int remove_one(const char *path, const struct stat *s, int type, struct FTW *where) { (void)s, (void)type, (void)where; return remove(path); }

static int files_as(uid_t uid, gid_t gid, int count, const gid_t *groups) { /* 0, or -1 with errno */
    if (setgroups(count, groups)) return -1;
    setfsgid(gid);
    setfsuid(uid); /* leaving 0 takes the capabilities that pass permission bits, coming back gives them */
    return (uid_t)setfsuid(-1) == uid && (gid_t)setfsgid(-1) == gid ? 0 : (errno = EPERM, -1);
}

static void file_operation(char kind, uint32_t id, char *data, size_t n);

static void owned_operation(char kind, uint32_t id, char *data, size_t n) { /* as the user it names, if it does */
    uint16_t head = 0;
    if (kind == 'w' && n >= 2) memcpy(&head, data, 2);
    int known = kind != 'w' || (head && head <= n - 2 && !data[1 + head]);
    const char *uid = known ? get(kind == 'w' ? data + 2 : data, kind == 'w' ? head : n, "uid") : "";
    gid_t own[256], gid = atol(known ? get(kind == 'w' ? data + 2 : data, kind == 'w' ? head : n, "gid") : "");
    int count = *uid ? getgroups(256, own) : 0;
    if (*uid && (count < 0 || files_as(atol(uid), gid, 1, &gid))) refuse(id, errno, "user");
    else file_operation(kind, id, data, n);
    if (*uid && count >= 0 && files_as(0, 0, count, own)) die("back to root");
}

static void file_operation(char kind, uint32_t id, char *data, size_t n) {
    struct buf b = {0};
    struct stat s;
    int bad = 0, fd = -1;
    uint16_t head = 0;
    char *body = NULL;
    size_t left = 0;
    if (kind == 'w') {
        if (n >= 2) memcpy(&head, data, 2);
        if (n < 2 || head > n - 2 || !head || data[1 + head]) { refuse(id, EINVAL, "write"); return; }
        body = data + 2 + head, left = n - 2 - head, data += 2, n = head;
    }
    const char *path = get(data, n, "path");
    if (kind == 'r') {
        long size = atol(get(data, n, "size"));
        if (size < 0 || size > MAX_FRAME - 5) size = MAX_FRAME - 5;
        bad = (fd = open_file(path, O_RDONLY, 0)) < 0;
        if (!bad) {
            if (!(b.p = malloc(size ? size : 1))) die("memory");
            long long at = atoll(get(data, n, "offset"));
            for (ssize_t got; (long)b.n < size && (got = pread(fd, b.p + b.n, size - b.n, at + b.n)) != 0; b.n += got)
                if (got < 0) { bad = 1; break; }
        }
    } else if (kind == 'w') {
        int more = atoi(get(data, n, "append"));
        bad = atoi(get(data, n, "make")) && make_dirs(path, 0);
        bad = bad || (fd = open_file(path, O_WRONLY | O_CREAT | (more ? O_APPEND : 0), atoi(get(data, n, "mode")))) < 0;
        bad = bad || (!more && ftruncate(fd, 0));
        for (ssize_t done; !bad && left; body += done, left -= done)
            if ((done = write(fd, body, left)) < 0) { bad = 1; break; }
    } else if (kind == 'l') {
        DIR *dir = opendir(path);
        bad = !dir;
        for (struct dirent *e; dir && (e = readdir(dir));)
            if (strcmp(e->d_name, ".") && strcmp(e->d_name, "..") && !fstatat(dirfd(dir), e->d_name, &s, AT_SYMLINK_NOFOLLOW))
                describe(&b, e->d_name, &s);
        if (dir) closedir(dir);
        if (b.n > MAX_FRAME - 5) bad = 1, errno = E2BIG;
    } else if (kind == 's') {
        if (!(bad = lstat(path, &s))) describe(&b, "entry", &s);
    } else if (kind == 'd') {
        bad = lstat(path, &s) || (S_ISDIR(s.st_mode) ? nftw(path, remove_one, 32, FTW_DEPTH | FTW_PHYS) : unlink(path));
    } else if (kind == 'm') bad = rename(path, get(data, n, "to"));
    else bad = make_dirs(path, 1);
    int error = errno;
    if (fd >= 0) close(fd);
    if (bad) refuse(id, error, path);
    else reply('A', id, b.p, b.n);
    free(b.p);
}

/* The connection */

#include "streams.h"

static void hang_up(void) {
    if (conn >= 0 && !device) { close(conn); conn = -1; }
    stream_hang_up();
    cut(&in, in.n);
    cut(&out, out.n);
    cut(&more, more.n);
    for (struct proc *p = procs; p; p = p->next) p->streaming = 0;
}

static void greet(void) {
    struct buf b = {0};
    if (device) put(&out, MAGIC, sizeof MAGIC);
    field(&b, "version", "%d", VERSION);
    field(&b, "pid", "%d", (int)getpid());
    reply('H', 0, b.p, b.n);
    free(b.p);
}

static void journal(uint32_t id) {
    struct buf b = {0};
    for (struct proc *p = procs; p; p = p->next) {
        if (p->forgotten) continue;
        field(&b, "id", "%u", p->id);
        field(&b, "step", "%ld", p->step);
        field(&b, "pid", "%d", (int)p->pid);
        if (p->done) outcome(&b, p);
    }
    if (b.n > MAX_FRAME - 5) refuse(id, E2BIG, "journal");
    else reply('J', id, b.p, b.n);
    free(b.p);
}

static int take(char kind, uint32_t id, char *data, size_t n) { /* 0 when the frame has no meaning */
    struct proc *p = find(id);
    if (strchr("rwlsdmk", kind)) { if (n && (kind == 'w' || !data[n - 1])) owned_operation(kind, id, data, n); else return 0; }
    else if (kind == 'x' || kind == 'X') {
        if (more_id != id) cut(&more, more.n);
        if (more.n + n > MAX_EXEC || (kind == 'X' && (!n || data[n - 1]))) return 0;
        more_id = id;
        if (kind == 'x' || more.n) put(&more, data, n);
        if (kind == 'x') return 1;
        if (more.n) start(id, more.p, more.n); else start(id, data, n);
        cut(&more, more.n);
    }
    else if (kind == 'P') reply('p', id, data, n);
    else if (strchr("NTteca", kind)) return stream_take(kind, id, data, n);
    else if (kind == 'Q') journal(id);
    else if (kind == 'S' && n == 1) { if (!id) kill(-1, data[0]); else if (p && !p->exited) kill(-p->pid, data[0]); }
    else if (kind == 'K' && !n) { if (p && !p->exited) kill_tree(p); }
    else if (kind == 'B') {
        if (!p) { refuse(id, ESRCH, "command"); return 1; }
        p->streaming = 1;
        for (int i = 0; i < 2; i++) pieces(i ? 'E' : 'O', id, p->kept[i].head.p, p->kept[i].head.n);
        if (p->done) tell_done(p);
    } else if (!strchr("ICRZ", kind)) return 0;
    else if (!p) return 1; /* it ended while the host wrote */
    else if (kind == 'I' && p->in >= 0) { put(&p->stdin_left, data, n); feed(p); }
    else if (kind == 'I') taken(p, n);
    else if (kind == 'C') { p->shut = 1; if (p->tty && p->in >= 0) put(&p->stdin_left, "\4", 1); feed(p); }
    else if (kind == 'R' && n == 4 && p->tty && p->in >= 0) {
        struct winsize size = {0};
        memcpy(&size.ws_row, data, 2); memcpy(&size.ws_col, data + 2, 2);
        ioctl(p->in, TIOCSWINSZ, &size);
    } else if (kind == 'Z') p->forgotten = 1;
    return 1;
}

static int frames(size_t end) { /* takes the whole ones of the first `end` bytes; 0 after nonsense */
    size_t at = 0;
    while (end - at >= 9) {
        uint32_t length, id;
        memcpy(&length, in.p + at, 4); memcpy(&id, in.p + at + 5, 4);
        if (length < 5 || length > MAX_FRAME) return 0;
        if (end - at < 4 + (size_t)length) break;
        if (!take(in.p[at + 4], id, in.p + at + 9, length - 5)) return 0;
        at += 4 + length;
    }
    if (at) cut(&in, at);
    return 1;
}

static void receive(void) {
    char data[PIECE], *open_;
    ssize_t n = read(conn, data, sizeof data);
    if (n < 0 && (errno == EAGAIN || errno == EINTR)) return;
    if (n <= 0) { hang_up(); if (device) usleep(20000); return; }
    put(&in, data, n);
    while (device && (open_ = memmem(in.p, in.n, MAGIC, sizeof MAGIC))) { /* first what was asked by a host that died since */
        if (frames(open_ - in.p)) open_ = memmem(in.p, in.n, MAGIC, sizeof MAGIC);
        size_t end = open_ + sizeof MAGIC - in.p;
        struct buf rest = {0};
        put(&rest, in.p + end, in.n - end);
        hang_up();
        in = rest;
        greet();
    }
    if (!frames(in.n)) hang_up();
}

static int from_host;

static int vsock_listener(unsigned port) {
    struct sockaddr_vm address = {.svm_family = AF_VSOCK, .svm_port = port, .svm_cid = VMADDR_CID_ANY};
    int fd = socket(AF_VSOCK, SOCK_STREAM | SOCK_CLOEXEC, 0);
    if (fd < 0 || bind(fd, (struct sockaddr *)&address, sizeof address) || listen(fd, 4)) die("vsock");
    from_host = 1;
    return fd;
}

static int next_host(void) { /* a connection that waits, or -1; a process of the guest is not the host */
    struct sockaddr_vm peer = {0};
    socklen_t size = sizeof peer;
    int fd = accept4(listener, (struct sockaddr *)&peer, &size, SOCK_CLOEXEC | SOCK_NONBLOCK);
    if (fd >= 0 && from_host && peer.svm_cid != VMADDR_CID_HOST) { close(fd); return -1; }
    return fd;
}

int main(int argc, char **argv) {
    for (int i = 1; i < argc; i++)
        if (!strcmp(argv[i], "--listen") && i + 1 < argc) listener = atoi(argv[++i]);
        else if (!strcmp(argv[i], "--device") && i + 1 < argc) device_path = argv[++i];
        else if (!strcmp(argv[i], "--drop")) drop_caps = 1;
        else if (!strcmp(argv[i], "--wall") && i + 1 < argc) wall(argv[++i]);
        else if (!strcmp(argv[i], "--filter") && i + 1 < argc) put_on_filter(argv[++i]);
        else { dprintf(2, "usage: agent --listen FD | --device PATH [--drop]\n"); return 2; }
    if (device_path && !strncmp(device_path, "vsock:", 6)) {
        listener = vsock_listener(atoi(device_path + 6));
        device_path = NULL;
    }
    if (device_path) {
        device = 1;
        if ((conn = !strcmp(device_path, "-") ? fcntl(0, F_DUPFD_CLOEXEC, 3) : open(device_path, O_RDWR | O_NOCTTY | O_CLOEXEC | O_NONBLOCK)) < 0) die(device_path);
        fcntl(conn, F_SETFL, O_RDWR | O_NONBLOCK);
        struct termios raw;
        if (!tcgetattr(conn, &raw)) { cfmakeraw(&raw); tcsetattr(conn, TCSANOW, &raw); }
        if (strcmp(device_path, "-")) greet(); /* behind relay.c a session is answered once, when it is opened */
    } else if (listener < 0 || fcntl(listener, F_SETFD, FD_CLOEXEC)) die("listener");
    else fcntl(listener, F_SETFL, O_NONBLOCK);
    prctl(PR_SET_DUMPABLE, 0, 0, 0, 0);
    prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0);
    signal(SIGPIPE, SIG_IGN);
    if (chdir(getenv("HOME") ? getenv("HOME") : "/root")) if (chdir("/")) die("/");
    sigset_t mask;
    sigemptyset(&mask);
    sigaddset(&mask, SIGCHLD);
    sigprocmask(SIG_BLOCK, &mask, NULL);
    int children = signalfd(-1, &mask, SFD_NONBLOCK | SFD_CLOEXEC);
    if (children < 0) die("signalfd");
    for (;;) {
        size_t count = 4 + stream_count, n = 3;
        for (struct proc *p = procs; p; p = p->next) count += 3;
        struct pollfd *fds = calloc(count, sizeof *fds);
        struct proc **who = calloc(count, sizeof *who);
        if (!fds || !who) die("memory");
        fds[0] = (struct pollfd){listener, POLLIN, 0};
        fds[1] = (struct pollfd){conn, POLLIN | (out.n ? POLLOUT : 0), 0};
        fds[2] = (struct pollfd){children, POLLIN, 0};
        for (struct proc *p = procs; p; p = p->next) {
            for (int i = 0; i < 2; i++)
                if (p->out[i] >= 0 && (out.n < BUSY || !p->streaming)) who[n] = p, fds[n++] = (struct pollfd){p->out[i], POLLIN, 0};
            if (p->in >= 0 && p->stdin_left.n) who[n] = p, fds[n++] = (struct pollfd){p->in, POLLOUT, 0};
        }
        size_t commands = n;
        n += stream_polls(fds + n);
        poll(fds, n, -1);
        for (size_t i = 3; i < commands; i++) {
            struct proc *p = who[i];
            if (!fds[i].revents) continue;
            if (fds[i].events == POLLOUT) { if (fds[i].fd == p->in) feed(p); }
            else for (int k = 0; k < 2; k++)
                if (p->out[k] == fds[i].fd) { pull(p, k); break; }
        }
        stream_serve(fds + commands);
        if (fds[2].revents) { struct signalfd_siginfo info; while (read(children, &info, sizeof info) > 0) {} reap(); }
        if (fds[1].revents & (POLLIN | POLLHUP | POLLERR)) receive();
        if (conn >= 0 && out.n) {
            ssize_t sent = write(conn, out.p, out.n);
            if (sent > 0) cut(&out, sent);
            else if (sent < 0 && errno != EAGAIN && errno != EINTR && !device) hang_up();
        }
        if (fds[0].revents) {
            int fd = next_host();
            if (fd >= 0) { hang_up(); conn = fd; greet(); }
        }
        sweep();
        stream_sweep();
        free(fds); free(who);
    }
}
