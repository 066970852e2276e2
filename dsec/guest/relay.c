/* Stands between the host and an agent that can only be given its standard input (gVisor's): keeps the listening socket, so
 * that a host process that died can come back, and passes bytes between the newest connection and the agent, as QEMU does
 * for a machine's port.
 *
 *   relay LISTENER PROGRAM ARG...     PROGRAM gets a socket as its standard input; its end is ours */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <sys/wait.h>
#include <unistd.h>

struct way { char data[1 << 16]; size_t at, end; };

static void die(const char *what) { dprintf(2, "relay: %s: %s\n", what, strerror(errno)); _exit(125); }

static int fill(struct way *w, int fd) { /* 0 when the other side has ended */
    ssize_t n = read(fd, w->data, sizeof w->data);
    if (n > 0) w->at = 0, w->end = n;
    return n > 0 || (n < 0 && (errno == EAGAIN || errno == EINTR));
}

static int drain(struct way *w, int fd) {
    ssize_t n = write(fd, w->data + w->at, w->end - w->at);
    if (n > 0) w->at += n;
    return n > 0 || (n < 0 && (errno == EAGAIN || errno == EINTR));
}

int main(int argc, char **argv) {
    static struct way in, out;
    int pair[2], listener = argc > 2 ? atoi(argv[1]) : -1, conn = -1, status;
    if (listener < 0 || socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, pair)) die("usage: relay LISTENER PROGRAM");
    fcntl(listener, F_SETFD, FD_CLOEXEC);
    pid_t pid = fork();
    if (pid < 0) die("fork");
    if (!pid) {
        prctl(PR_SET_PDEATHSIG, SIGKILL);
        dup2(pair[1], 0);
        execv(argv[2], argv + 2);
        die(argv[2]);
    }
    close(pair[1]);
    fcntl(pair[0], F_SETFL, O_NONBLOCK);
    fcntl(listener, F_SETFL, O_NONBLOCK);
    signal(SIGPIPE, SIG_IGN);
    for (;;) {
        int more = in.at == in.end, room = out.at == out.end;
        struct pollfd fds[3] = {{listener, POLLIN, 0}, {conn, (more ? POLLIN : 0) | (room ? 0 : POLLOUT), 0}, {pair[0], (room ? POLLIN : 0) | (more ? 0 : POLLOUT), 0}};
        if (poll(fds, 3, -1) < 0 && errno != EINTR) die("poll");
        if (fds[2].revents) {
            if (fds[2].revents & POLLOUT && !more && !drain(&in, pair[0])) break;
            if (room && fds[2].revents & (POLLIN | POLLHUP | POLLERR) && !fill(&out, pair[0])) break;
            if (conn < 0) out.at = out.end; /* nobody listens: what is said is lost, as on a serial line */
        }
        if (conn >= 0 && fds[1].revents) {
            int good = 1;
            if (fds[1].revents & POLLOUT && out.at < out.end) good = drain(&out, conn);
            if (good && in.at == in.end && fds[1].revents & (POLLIN | POLLHUP | POLLERR)) good = fill(&in, conn);
            else if (fds[1].revents & (POLLHUP | POLLERR)) good = 0;
            if (!good) { close(conn); conn = -1; out.at = out.end; }
        }
        if (fds[0].revents) {
            int fd = accept4(listener, NULL, NULL, SOCK_CLOEXEC | SOCK_NONBLOCK);
            if (fd >= 0) { if (conn >= 0) close(conn); conn = fd; out.at = out.end; }
        }
    }
    while (waitpid(pid, &status, 0) < 0 && errno == EINTR) {}
    return WIFEXITED(status) ? WEXITSTATUS(status) : 128 + WTERMSIG(status);
}
