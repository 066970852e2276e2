/* What the agent puts up around itself and what it starts, beside what already stands; part of agent.c. */

/* A second wall, which needs no privilege: the agent and all it starts may open files below one folder only, and may signal
 * and reach by abstract socket only each other. In a container the folder is its root, so a path that leads
 * out of it (a descriptor that leaked, another process's root) still opens nothing. Nor can they mount: Landlock forbids it.
 * A kernel without it (before 5.13, or switched off) is not an error. The kernel's headers may be older than the kernel. */

static void wall(const char *folder) {
    struct { uint64_t fs, net, scoped; } rules = {0x1fff, 0, 0};
    struct { uint64_t allowed; int32_t fd; } __attribute__((packed)) below = {0, open(folder, O_PATH | O_CLOEXEC)};
    int version = syscall(444 /* landlock_create_ruleset */, NULL, 0, 1 /* tell the version */);
    if (version < 1) { close(below.fd); return; }
    if (version >= 2) rules.fs |= 1 << 13; /* move and link between folders */
    if (version >= 3) rules.fs |= 1 << 14; /* truncate */
    if (version >= 5) rules.fs |= 1 << 15; /* ioctl on devices */
    if (version >= 6) rules.scoped = 3;    /* abstract sockets, signals */
    below.allowed = rules.fs;
    int fd = syscall(444, &rules, version < 4 ? 8 : version < 6 ? 16 : sizeof rules, 0);
    if (below.fd < 0 || fd < 0 || syscall(445 /* add_rule */, fd, 1 /* below a path */, &below, 0) ||
        prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) || syscall(446 /* restrict_self */, fd, 0)) die("landlock");
    close(fd);
    close(below.fd);
}

static void put_on_filter(const char *path) {
    static struct sock_filter code[4096];
    int fd = open(path, O_RDONLY | O_CLOEXEC);
    ssize_t n = fd < 0 ? -1 : read(fd, code, sizeof code);
    struct sock_fprog program = {n / sizeof *code, code};
    if (n <= 0 || prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) || prctl(PR_SET_SECCOMP, 2 /* SECCOMP_MODE_FILTER */, &program)) die(path);
    close(fd);
}

static void no_capabilities(void) {
    struct __user_cap_header_struct head = {_LINUX_CAPABILITY_VERSION_3, 0};
    struct __user_cap_data_struct none[2] = {{0}};
    for (int cap = 0; cap < 64; cap++) prctl(PR_CAPBSET_DROP, cap, 0, 0, 0);
    prctl(PR_CAP_AMBIENT, PR_CAP_AMBIENT_CLEAR_ALL, 0, 0, 0);
    prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0);
    if (syscall(SYS_capset, &head, none)) _exit(127);
}
