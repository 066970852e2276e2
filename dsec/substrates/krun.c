/* Becomes a libkrun machine: loads the library, tells it the machine, and enters it for good.
 *
 *   krun LIBRARY CPUS MEMORY DISKS PORT WORDS     memory in MiB; /kernel, /initrd and /disk0.. are in this process's root,
 *                                                 the agent's port becomes the socket /box/v.sock, the console /box/console;
 *                                                 WORDS: of the kernel's command line, all but console=
 *
 * libkrun calls exit() with its guest, so it needs a process of its own; its functions are looked up by name (libkrun.h), so
 * that we build without it. Where it can (1.16 and later) it is given each device by name: a serial console, which a kernel
 * shows before any module is loaded, and a vsock without TSI, the host's sockets in the guest. An older one makes its own;
 * its TSI ends in the empty network namespace we are in. */
#include <dlfcn.h>
#include <fcntl.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { ELF_KERNEL = 1 };
static void *library;

static void *find(const char *name) {
    void *found = dlsym(library, name);
    if (!found) { fprintf(stderr, "libkrun: this library is too old: it has no %s\n", name); exit(125); }
    return found;
}

static int32_t (*optional(const char *name))(uint32_t) { return (int32_t (*)(uint32_t))dlsym(library, name); }

static void check(int32_t answer, const char *what) {
    if (answer < 0) { fprintf(stderr, "libkrun: %s: %s\n", what, strerror(-answer)); exit(125); }
}

#define CALL(name, types, ...) check(((int32_t (*) types)find(#name))(__VA_ARGS__), #name)

int main(int argc, char **argv) {
    if (argc != 7) { fprintf(stderr, "usage: krun LIBRARY CPUS MEMORY DISKS PORT WORDS\n"); return 2; }
    if (!(library = dlopen(argv[1], RTLD_NOW | RTLD_LOCAL))) { fprintf(stderr, "libkrun: %s\n", dlerror()); return 125; }
    const char *const none[] = {NULL};
    int32_t context = ((int32_t (*)(void))find("krun_create_ctx"))();
    check(context, "krun_create_ctx");
    CALL(krun_set_log_level, (uint32_t), 1);
    CALL(krun_set_vm_config, (uint32_t, uint8_t, uint32_t), context, atoi(argv[2]), atoi(argv[3]));
    int serial = optional("krun_disable_implicit_console") && optional("krun_add_serial_console_default");
    int plain = optional("krun_disable_implicit_vsock") && optional("krun_add_vsock");
    char words[2048];
    if (snprintf(words, sizeof words, "console=%s %s", serial ? "ttyS0" : "hvc0", argv[6]) >= (int)sizeof words) {
        fprintf(stderr, "libkrun: a command line of more than %zu bytes\n", sizeof words);
        return 125;
    }
    CALL(krun_set_kernel, (uint32_t, const char *, uint32_t, const char *, const char *), context, "/kernel", ELF_KERNEL, "/initrd", words);
    for (int n = 0; n < atoi(argv[4]); n++) {
        char id[16], path[16];
        snprintf(id, sizeof id, "disk%d", n);
        snprintf(path, sizeof path, "/disk%d", n);
        CALL(krun_add_disk, (uint32_t, const char *, const char *, bool), context, id, path, true);
    }
    if (plain) {
        CALL(krun_disable_implicit_vsock, (uint32_t), context);
        CALL(krun_add_vsock, (uint32_t, uint32_t), context, 0);
    } else CALL(krun_set_port_map, (uint32_t, const char *const *), context, none); /* no port of the guest is the host's */
    CALL(krun_add_vsock_port2, (uint32_t, uint32_t, const char *, bool), context, atoi(argv[5]), "/box/v.sock", true);
    if (serial) {
        int console = open("/box/console", O_WRONLY | O_CREAT | O_APPEND | O_CLOEXEC, 0600);
        if (console < 0) { perror("libkrun: /box/console"); return 125; }
        CALL(krun_disable_implicit_console, (uint32_t), context);
        CALL(krun_add_serial_console_default, (uint32_t, int, int), context, -1, console);
    } else CALL(krun_set_console_output, (uint32_t, const char *), context, "/box/console");
    CALL(krun_start_enter, (uint32_t), context);
    return 125;
}
