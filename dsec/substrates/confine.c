/* Takes every privilege from itself, then becomes QEMU.
 *
 *   confine [--cgroup DIR]... [--uid UID] [--group GID] [--show NAME=PATH]... [--box DIR] --files BYTES -- PROGRAM ARG...
 *
 * With --uid (we are root) PROGRAM runs as that host id, which owns nothing; without, as the caller inside a user namespace
 * of its own. Either way: member of its cgroups first, an empty network, ipc and uts namespace, no core file, no new
 * privileges, no file longer than --files, and a root of its own that holds the host's programs (/usr, read-only), four
 * devices, its own process, what --show names (read-only) and the folder --box as /box, and nothing else of the host. --group is one supplementary group (that of /dev/kvm). */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <grp.h>
#include <sched.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mount.h>
#include <sys/prctl.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <unistd.h>

static void die(const char *what) { fprintf(stderr, "confine: %s: %s\n", what, strerror(errno)); exit(125); }

static void limit(int which, rlim_t most) {
    struct rlimit r;
    if (getrlimit(which, &r)) die("rlimit");
    if (r.rlim_max == RLIM_INFINITY || r.rlim_max > most) r.rlim_max = most;
    r.rlim_cur = r.rlim_max;
    if (setrlimit(which, &r)) die("rlimit");
}

static void put(const char *path, const char *text) {
    int fd = open(path, O_WRONLY | O_CLOEXEC);
    if (fd < 0 || write(fd, text, strlen(text)) < 0) die(path);
    close(fd);
}

static void own_ids(uid_t uid, gid_t gid) { /* as an ordinary user: nobody but ourselves, and so no capability after exec */
    char map[64];
    put("/proc/self/setgroups", "deny");
    snprintf(map, sizeof map, "%u %u 1\n", uid, uid); put("/proc/self/uid_map", map);
    snprintf(map, sizeof map, "%u %u 1\n", gid, gid); put("/proc/self/gid_map", map);
}

static void bind_to(const char *from, const char *to, unsigned long flags) {
    if (mount(from, to, NULL, MS_BIND | MS_REC, NULL)) die(from);
    if (flags && mount(NULL, to, NULL, MS_BIND | MS_REMOUNT | flags, NULL)) die(to);
}

static const char *shown[40], *box; /* NAME=PATH: what is found as /NAME */
static int shows;

static void show(const char *name, const char *path, unsigned long flags) {
    struct stat s;
    if (stat(path, &s)) die(path);
    int fd = S_ISDIR(s.st_mode) ? mkdir(name, 0755) : open(name, O_CREAT | O_EXCL | O_WRONLY | O_CLOEXEC, 0600);
    if (fd < 0) die(name);
    if (!S_ISDIR(s.st_mode)) close(fd);
    bind_to(path, name, flags | MS_NOSUID | MS_NODEV);
}

static void own_root(void) { /* built on /sys, which is always there and which nobody here shall see */
    static const char *const parts[] = {"bin", "sbin", "lib", "lib32", "lib64", "libx32"}, *const nodes[] = {"null", "urandom", "zero", "kvm"};
    char from[64], to[64], link[256];
    struct stat s;
    if (mount("", "/", NULL, MS_REC | MS_PRIVATE, NULL)) die("private mounts");
    if (mount("tmpfs", "/sys", "tmpfs", MS_NOSUID, "mode=755,size=64k") || chdir("/sys")) die("tmpfs");
    if (mkdir("usr", 0755) || mkdir("dev", 0755) || mkdir("proc", 0755)) die("root");
    bind_to("/usr", "usr", MS_RDONLY | MS_NOSUID | MS_NODEV);
    for (size_t i = 0; i < sizeof parts / sizeof *parts; i++) {
        snprintf(from, sizeof from, "/%s", parts[i]);
        ssize_t n = readlink(from, link, sizeof link - 1);
        if (n >= 0) { link[n] = 0; if (symlink(link, parts[i])) die(from); }
        else if (!stat(from, &s)) { if (mkdir(parts[i], 0755)) die(from); bind_to(from, parts[i], MS_RDONLY | MS_NOSUID | MS_NODEV); }
    }
    for (size_t i = 0; i < sizeof nodes / sizeof *nodes; i++) {
        snprintf(from, sizeof from, "/dev/%s", nodes[i]);
        snprintf(to, sizeof to, "dev/%s", nodes[i]);
        if (stat(from, &s)) continue;
        int fd = open(to, O_CREAT | O_WRONLY | O_CLOEXEC, 0600);
        if (fd < 0) die(to);
        close(fd);
        bind_to(from, to, 0);
    }
    for (int i = 0; i < shows; i++) {
        snprintf(to, sizeof to, "%.*s", (int)strcspn(shown[i], "="), shown[i]);
        show(to, shown[i] + strlen(to) + 1, MS_RDONLY);
    }
    if (box) show("box", box, 0);
    if (mount("proc", "proc", "proc", MS_NOSUID | MS_NODEV | MS_NOEXEC, "hidepid=invisible,subset=pid")) { /* only root may */
        snprintf(from, sizeof from, "/proc/%d", getpid());
        snprintf(to, sizeof to, "proc/%d", getpid());
        if (mkdir(to, 0555)) die(to);
        bind_to(from, to, 0);
        if (symlink(to + strlen("proc/"), "proc/self")) die("proc/self");
    }
    if (mount(NULL, "/sys", NULL, MS_REMOUNT | MS_BIND | MS_RDONLY | MS_NOSUID, NULL)) die("read-only root");
    if (syscall(SYS_pivot_root, ".", ".") || umount2(".", MNT_DETACH) || chdir("/")) die("pivot_root");
}

int main(int argc, char **argv) {
    long uid = 0;
    gid_t groups[1];
    int i = 1, count = 0;
    for (; i + 1 < argc && strcmp(argv[i], "--"); i += 2) {
        char path[4096];
        if (!strcmp(argv[i], "--cgroup")) {
            snprintf(path, sizeof path, "%s/cgroup.procs", argv[i + 1]);
            int fd = open(path, O_WRONLY | O_CLOEXEC);
            if (fd < 0 || write(fd, "0", 1) != 1) die(path);
            close(fd);
        } else if (!strcmp(argv[i], "--uid")) uid = atol(argv[i + 1]);
        else if (!strcmp(argv[i], "--box")) box = argv[i + 1];
        else if (!strcmp(argv[i], "--show") && shows < 40 && strchr(argv[i + 1], '=')) shown[shows++] = argv[i + 1];
        else if (!strcmp(argv[i], "--group")) groups[count++ & 0] = atol(argv[i + 1]);
        else if (!strcmp(argv[i], "--files")) limit(RLIMIT_FSIZE, strtoull(argv[i + 1], NULL, 10));
        else { errno = EINVAL; die(argv[i]); }
    }
    if (++i >= argc) { errno = EINVAL; die("no program"); }
    if (!geteuid() && !uid) { errno = EPERM; die("root needs --uid"); }
    uid_t me = geteuid();
    gid_t mine = getegid();
    if (unshare(CLONE_NEWNS | CLONE_NEWNET | CLONE_NEWIPC | CLONE_NEWUTS | (uid ? 0 : CLONE_NEWUSER))) die("namespaces");
    if (!uid) own_ids(me, mine);
    own_root();
    limit(RLIMIT_CORE, 0);
    limit(RLIMIT_NOFILE, 256);
    if (uid && (setgroups(count ? 1 : 0, groups) || setresgid(uid, uid, uid) || setresuid(uid, uid, uid))) die("uid");
    if (prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)) die("no_new_privs");
    signal(SIGPIPE, SIG_DFL);
    execv(argv[i], argv + i);
    die(argv[i]);
}
