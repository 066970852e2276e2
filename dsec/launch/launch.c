/* Puts a sandbox's walls up in the one order that leaves no gap, then becomes bubblewrap or an OCI runtime.
 *
 *   launch --keep N [--cgroup FILE]... [--base UID] [--wait FD] --root DIR (--size BYTES | --loop IMAGE) --lower DIR...
 *          [--pids N --memory BYTES] [--oci CONFIG [--nested 1]] -- PROGRAM ARG...
 *
 * --wait: started ahead of its sandbox. It stops after its cgroups and all namespaces but that of mounts, and the arguments
 * from --root on come through FD, a socket (a length, NUL-ended strings, shutdown). Its mounts are made after that, or it
 * would not see the host's newest.
 *
 * 1 a session of its own, no file descriptor above N    2 member of its cgroups, so nothing ever runs outside them
 * 3 a user namespace: with --base (we are root) ids 0..65535 are host ids UID.., else id 0 is the caller; a network with
 *   nothing but lo, IPC and a host name, all owned by it
 * 4 a private mount namespace: nothing mounted here is seen by the host or outlives the sandbox
 * 5 a capped writable layer over the read-only lowers, whose owners are shifted by the same map; mounted on /sys, which
 *   is always there, which every id may reach, and which no sandbox shall see
 * 6 no user namespace below ours, no core files, no new privileges; host root is gone for good before PROGRAM runs
 *
 * --oci: PROGRAM is a runtime. It finds CONFIG as /run/config.json on a small memory disk of its own, the root on /mnt, and
 * no v2 cgroups, which a runtime would take for its own. --nested: it needs a user namespace itself (gVisor). */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <grp.h>
#include <net/if.h>
#include <linux/loop.h>
#include <linux/securebits.h>
#include <linux/mount.h>
#include <poll.h>
#include <sched.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mount.h>
#include <sys/prctl.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/sysmacros.h>
#include <sys/wait.h>
#include <unistd.h>

enum { IDS = 65536, LOWERS = 64 };

static void die(const char *what) { dprintf(2, "launch: %s: %s\n", what, strerror(errno)); _exit(125); }

static void put(const char *path, const char *text) {
    int fd = open(path, O_WRONLY | O_CLOEXEC);
    if (fd < 0 || write(fd, text, strlen(text)) < 0) die(path);
    close(fd);
}

enum { APART = CLONE_NEWUSER | CLONE_NEWNET | CLONE_NEWIPC | CLONE_NEWUTS };

static void settle(void) { /* in new namespaces */
    struct ifreq lo = {.ifr_name = "lo", .ifr_flags = IFF_UP};
    int fd = socket(AF_INET, SOCK_DGRAM | SOCK_CLOEXEC, 0);
    if (fd < 0 || ioctl(fd, SIOCSIFFLAGS, &lo)) die("lo");
    close(fd);
    if (sethostname("sandbox", 7)) die("host name");
}

static int enter(pid_t pid, const char *name, int type) { /* a namespace of a process: its descriptor; not yet with type 0 */
    char path[64];
    snprintf(path, sizeof path, "/proc/%d/ns/%s", pid, name);
    int fd = open(path, O_RDONLY | O_CLOEXEC);
    if (fd < 0 || (type && setns(fd, type))) die(path);
    if (type) close(fd);
    return fd;
}

static int user_namespace(long base) { /* ids 0.. are base.. of the host; made by a child that does nothing else */
    char path[64], map[64]; /* made as that id: what the kernel counts per user (inotify, queues) is charged to the maker */
    int ready[2];
    if (pipe2(ready, O_CLOEXEC)) die("pipe");
    int kept = !prctl(PR_SET_SECUREBITS, SECBIT_NO_SETUID_FIXUP); /* a host may forbid namespaces without a capability */
    if (setresuid(-1, base, -1)) die("effective id");
    pid_t pid = syscall(SYS_clone, APART | SIGCHLD, 0, 0, 0, 0);
    if (pid < 0) die("user namespace");
    if (!pid) { close(ready[1]); settle(); if (read(ready[0], map, 1) < 0) {} _exit(0); }
    if (setresuid(-1, 0, -1) || (kept && prctl(PR_SET_SECUREBITS, 0))) die("effective id");
    snprintf(map, sizeof map, "0 %ld %d\n", base, IDS);
    snprintf(path, sizeof path, "/proc/%d/uid_map", pid); put(path, map);
    snprintf(path, sizeof path, "/proc/%d/gid_map", pid); put(path, map);
    int fd = enter(pid, "user", 0);
    enter(pid, "net", CLONE_NEWNET); enter(pid, "ipc", CLONE_NEWIPC); enter(pid, "uts", CLONE_NEWUTS);
    close(ready[0]); close(ready[1]);
    int status;
    if (waitpid(pid, &status, 0) != pid || status) _exit(125);
    return fd;
}

static void own_namespaces(void) { /* as an ordinary user: id 0 is us */
    char map[64];
    unsigned uid = geteuid(), gid = getegid();
    if (unshare(APART)) die("user namespace (kernel.unprivileged_userns_clone, AppArmor?)");
    put("/proc/self/setgroups", "deny");
    snprintf(map, sizeof map, "0 %u 1\n", uid); put("/proc/self/uid_map", map);
    snprintf(map, sizeof map, "0 %u 1\n", gid); put("/proc/self/gid_map", map);
    const char *most = "/proc/sys/user/max_inotify_instances"; /* half of what the caller has */
    if (!access(most, W_OK)) put(most, "64");
    settle();
}

static void mount_loop(const char *image, const char *target) { /* an ext4 image of fixed size; freed with its mount */
    char device[32];
    int control = open("/dev/loop-control", O_RDWR | O_CLOEXEC), file = open(image, O_RDWR | O_CLOEXEC);
    if (control < 0 || file < 0) die(control < 0 ? "/dev/loop-control" : image);
    for (int tries = 0; tries < 50; tries++) { /* another launcher may take the same free device */
        int n = ioctl(control, LOOP_CTL_GET_FREE);
        snprintf(device, sizeof device, "/dev/loop%d", n);
        int loop = n < 0 ? -1 : open(device, O_RDWR | O_CLOEXEC);
        struct loop_config config = {.fd = file, .info.lo_flags = LO_FLAGS_AUTOCLEAR};
        if (loop >= 0 && !ioctl(loop, LOOP_CONFIGURE, &config)) {
            if (mount(device, target, "ext4", MS_NOSUID | MS_NODEV, "")) die("mount of the disk image");
            return;
        }
        if (loop >= 0) close(loop);
        if (errno != EBUSY) break;
    }
    die("loop device");
}

static const char *shifted(const char *lower, int users, const char *target) { /* the folder with its owners mapped */
    int tree = syscall(SYS_open_tree, AT_FDCWD, lower, OPEN_TREE_CLONE | OPEN_TREE_CLOEXEC);
    struct mount_attr attr = {.attr_set = MOUNT_ATTR_IDMAP | MOUNT_ATTR_RDONLY | MOUNT_ATTR_NOSUID | MOUNT_ATTR_NODEV, .userns_fd = users};
    if (tree < 0) die(lower);
    if (syscall(SYS_mount_setattr, tree, "", AT_EMPTY_PATH, &attr, sizeof attr)) {
        close(tree); /* a file system or kernel without mapped mounts: its files belong to nobody inside, which is safe */
        return lower;
    }
    if (mkdir(target, 0700) && errno != EEXIST) die(target);
    if (syscall(SYS_move_mount, tree, "", AT_FDCWD, target, MOVE_MOUNT_F_EMPTY_PATH)) die("move_mount");
    close(tree);
    return target;
}

static void devices(const char *target) { /* as bubblewrap's --dev, which binds each of them: 2 ms
    * of a start. The host's root owns them, so nobody inside can change them or take one away. */
    static const struct { const char *name; int minor; } nodes[] = {{"null", 3}, {"zero", 5}, {"full", 7}, {"random", 8}, {"urandom", 9}};
    static const char *links[][2] = {{"/proc/self/fd", "fd"}, {"/proc/self/fd/0", "stdin"}, {"/proc/self/fd/1", "stdout"},
        {"/proc/self/fd/2", "stderr"}, {"/proc/kcore", "core"}, {"pts/ptmx", "ptmx"}};
    umask(0);
    if (mount("tmpfs", target, "tmpfs", MS_NOSUID, "mode=0755") || chdir(target)) die(target);
    for (unsigned k = 0; k < sizeof nodes / sizeof *nodes; k++) if (mknod(nodes[k].name, S_IFCHR | 0666, makedev(1, nodes[k].minor))) die(nodes[k].name);
    if (mknod("tty", S_IFCHR | 0666, makedev(5, 0))) die("tty");
    for (unsigned k = 0; k < sizeof links / sizeof *links; k++) if (symlink(links[k][0], links[k][1])) die(links[k][1]);
    if (mkdir("shm", 01777) || mkdir("pts", 0755)) die(target);
    if (mount("devpts", "pts", "devpts", MS_NOSUID | MS_NOEXEC, "newinstance,ptmxmode=0666,mode=620")) die("devpts");
    umask(022);
}

static void runtime_folder(const char *config, long base) { /* for a runtime's state, and the bundle it runs */
    char data[1 << 16], options[128];
    int fd = open(config, O_RDONLY | O_CLOEXEC);
    ssize_t n = fd < 0 ? -1 : read(fd, data, sizeof data);
    if (n <= 0 || n == sizeof data) die(config);
    close(fd);
    umount2("/sys/fs/cgroup/unified", MNT_DETACH);
    snprintf(options, sizeof options, base ? "mode=0700,size=4m,uid=%ld,gid=%ld" : "mode=0700,size=4m", base, base);
    if (mount("tmpfs", "/run", "tmpfs", MS_NOSUID | MS_NODEV, options)) die("/run");
    if ((fd = open("/run/config.json", O_WRONLY | O_CREAT | O_CLOEXEC, 0644)) < 0 || write(fd, data, n) != n) die("/run/config.json");
    close(fd);
}

static const char *oci, *lowers[LOWERS], *root, *size, *image, *pids, *memory, *cgroups[16];
static int count, groups, keep = 2, nested, waiting = -1;
static long base;

static int parse(int argc, char **argv, int i) { /* up to PROGRAM, whose place is returned */
    for (; i + 1 < argc && strcmp(argv[i], "--"); i += 2) {
        char *key = argv[i], *value = argv[i + 1];
        if (!strcmp(key, "--keep")) keep = atoi(value);
        else if (!strcmp(key, "--cgroup") && groups < 16) cgroups[groups++] = value;
        else if (!strcmp(key, "--base")) base = atol(value);
        else if (!strcmp(key, "--wait")) waiting = atoi(value);
        else if (!strcmp(key, "--root")) root = value;
        else if (!strcmp(key, "--size")) size = value;
        else if (!strcmp(key, "--loop")) image = value;
        else if (!strcmp(key, "--pids")) pids = value;
        else if (!strcmp(key, "--memory")) memory = value;
        else if (!strcmp(key, "--oci")) oci = value;
        else if (!strcmp(key, "--nested")) nested = 1;
        else if (!strcmp(key, "--lower") && count < LOWERS) lowers[count++] = value;
        else { dprintf(2, "launch: what is %s?\n", key); _exit(2); }
    }
    return i + 1;
}

static char **rest(int fd, int *argc) { /* ends when nobody is left who could send it */
    unsigned size, got = 0;
    char *data;
    struct pollfd sent = {.fd = fd, .events = POLLRDHUP}; /* waking at a write, we would wait for its writer's processor */
    if (poll(&sent, 1, -1) < 0) _exit(0);
    if (read(fd, &size, sizeof size) != sizeof size || size > 1 << 20 || !(data = malloc(size + 1))) _exit(0);
    for (ssize_t n; got < size; got += n) if ((n = read(fd, data + got, size - got)) <= 0) _exit(0);
    close(fd);
    data[size] = 0;
    char **argv = calloc(size + 1, sizeof *argv);
    if (!argv) die("memory");
    for (char *word = data; word < data + size; word += strlen(word) + 1) argv[(*argc)++] = word;
    return argv;
}

int main(int argc, char **argv) {
    int i = parse(argc, argv, 1);
    if (geteuid() == 0 && base < 65536) { errno = EPERM; die("root must name an id range of its own (--base)"); }
    setsid();
    umask(022);
    if (syscall(SYS_close_range, keep + 1, ~0U, 0) && errno != ENOSYS) die("close_range");
    for (int k = 0; k < groups; k++) put(cgroups[k], "0"); /* v1: "tasks", which moves one thread without stopping the world */

    int users = -1;
    if (geteuid()) own_namespaces();
    else users = user_namespace(base);
    if (waiting >= 0) {
        argc = 0;
        argv = rest(waiting, &argc);
        i = parse(argc, argv, 0);
    }
    if (i >= argc || !root || !count || !(size || image)) { dprintf(2, "launch: incomplete\n"); return 2; }
    if (unshare(CLONE_NEWNS)) die("mount namespace");
    if (mount("", "/", NULL, MS_REC | MS_PRIVATE, NULL)) die("private mounts");

    const char *disk = "disk", *merged = oci ? "/mnt" : "/sys", *upper = "disk/upper", *work = "disk/work";
    char options[4096]; /* the kernel takes a page, so every path that can be is relative to the root */
    if (oci) runtime_folder(oci, base);
    if (chdir(root)) die(root);
    snprintf(options, sizeof options, "mode=0755,size=%s,nr_inodes=%ld", size ? size : "0", size ? atol(size) / 4096 + 1024 : 0);
    if (mkdir(disk, 0700) && errno != EEXIST) die(root);
    if (image) mount_loop(image, disk);
    else if (mount("tmpfs", disk, "tmpfs", MS_NOSUID | MS_NODEV, options)) die("tmpfs");
    if ((mkdir(upper, 0755) && errno != EEXIST) || (mkdir(work, 0755) && errno != EEXIST)) die(upper);
    if (base && chown(upper, base, base)) die(upper);
    int n = snprintf(options, sizeof options, "%supperdir=%s,workdir=%s,lowerdir=", users < 0 ? "userxattr," : "volatile,", upper, work);
    for (int k = 0; k < count; k++) {
        char *name;
        if (asprintf(&name, "disk/lower%d", k) < 0) die("memory");
        n += snprintf(options + n, sizeof options - n, "%s%s", k ? ":" : "", users < 0 ? lowers[k] : shifted(lowers[k], users, name));
        if (n >= (int)sizeof options) { errno = E2BIG; die("lowers"); }
    }
    if (mount("overlay", merged, "overlay", MS_NOSUID | MS_NODEV, options)) die("overlay");
    if (users >= 0 && !oci) devices("/sys/dev");

    if (users >= 0 && (setns(users, CLONE_NEWUSER) || setgroups(0, NULL) || setresgid(0, 0, 0) || setresuid(0, 0, 0))) die("into the user namespace");
    if (!nested) put("/proc/sys/user/max_user_namespaces", "0");
    struct rlimit none = {0, 0}, processes, data;
    setrlimit(RLIMIT_CORE, &none);
    if (pids) { /* without cgroups: processes are counted per user namespace, memory per process */
        processes.rlim_cur = processes.rlim_max = atol(pids);
        if (setrlimit(RLIMIT_NPROC, &processes)) die("RLIMIT_NPROC");
    }
    if (memory) {
        data.rlim_cur = data.rlim_max = atoll(memory);
        if (setrlimit(RLIMIT_DATA, &data)) die("RLIMIT_DATA");
    }
    if (prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)) die("no_new_privs");
    execv(argv[i], argv + i);
    die(argv[i]);
}
