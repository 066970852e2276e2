/* Takes every privilege from itself, then becomes QEMU.
 *
 *   confine [--cgroup DIR]... [--uid UID] [--group GID] --files BYTES -- PROGRAM ARG...
 *
 * With --uid (we are root) PROGRAM runs as that host id, which owns nothing; without, as the caller inside a user namespace
 * of its own. Either way: member of its cgroups first, an empty network, ipc and uts namespace, no core file, no new
 * privileges, no file longer than --files. --group is one supplementary group (that of /dev/kvm). */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <grp.h>
#include <sched.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/resource.h>
#include <unistd.h>

static void die(const char *what) { fprintf(stderr, "confine: %s: %s\n", what, strerror(errno)); exit(125); }

static void limit(int which, rlim_t most) {
    struct rlimit r;
    if (getrlimit(which, &r)) die("rlimit");
    if (r.rlim_max == RLIM_INFINITY || r.rlim_max > most) r.rlim_max = most;
    r.rlim_cur = r.rlim_max;
    if (setrlimit(which, &r)) die("rlimit");
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
        else if (!strcmp(argv[i], "--group")) groups[count++ & 0] = atol(argv[i + 1]);
        else if (!strcmp(argv[i], "--files")) limit(RLIMIT_FSIZE, strtoull(argv[i + 1], NULL, 10));
        else { errno = EINVAL; die(argv[i]); }
    }
    if (++i >= argc) { errno = EINVAL; die("no program"); }
    if (!geteuid() && !uid) { errno = EPERM; die("root needs --uid"); }
    if (unshare(CLONE_NEWNET | CLONE_NEWIPC | CLONE_NEWUTS | (uid ? 0 : CLONE_NEWUSER))) die("namespaces");
    limit(RLIMIT_CORE, 0);
    limit(RLIMIT_NOFILE, 256);
    if (uid && (setgroups(count ? 1 : 0, groups) || setresgid(uid, uid, uid) || setresuid(uid, uid, uid))) die("uid");
    if (prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)) die("no_new_privs");
    signal(SIGPIPE, SIG_DFL);
    execv(argv[i], argv + i);
    die(argv[i]);
}
