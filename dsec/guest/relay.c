/* Stands between the host and an agent that can only be given its standard input (gVisor's): keeps the listening socket, so
 * that a host process that died can come back, and passes bytes between the newest connection and the agent, as QEMU does
 * for a machine's port. A session, which MAGIC opens, is answered before the next connection is taken: else the answer to
 * a host that died would be read by its successor, as that of its own.
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

static const char MAGIC[] = "\x93""dsec\x1f""open\xe7\x0a\x5b\xc2\x80"; /* 16 bytes with the final NUL; the first is in it once */
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

static int echoed(const struct way *w) { /* whether MAGIC ends in what came */
    static size_t same;
    int found = 0;
    for (size_t i = w->at; i < w->end; i++) {
        same = w->data[i] == MAGIC[same] ? same + 1 : w->data[i] == MAGIC[0];
        if (same == sizeof MAGIC) same = 0, found = 1;
    }
    return found;
}

int main(int argc, char **argv) {
    static struct way in, out;
    int pair[2], listener = argc > 2 ? atoi(argv[1]) : -1, conn = -1, owed = 0, status;
    size_t told = 0; /* bytes that the connection has sent */
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
        struct pollfd fds[3] = {{owed || !more ? -1 : listener, POLLIN, 0}, {more || !room ? conn : -1, (more ? POLLIN : 0) | (room ? 0 : POLLOUT), 0}, {pair[0], (room ? POLLIN : 0) | (more ? 0 : POLLOUT), 0}};
        if (poll(fds, 3, -1) < 0) { if (errno != EINTR) die("poll"); continue; }
        if (fds[2].revents) {
            if (fds[2].revents & POLLOUT && !more && !drain(&in, pair[0])) break;
            if (room && fds[2].revents & (POLLIN | POLLHUP | POLLERR)) {
                if (!fill(&out, pair[0])) break;
                if (echoed(&out)) owed = 0;
                if (conn < 0) out.at = out.end; /* nobody listens: what is said is lost, as on a serial line */
            }
        }
        if (conn >= 0 && fds[1].revents) {
            if (out.at < out.end && !drain(&out, conn)) out.at = out.end; /* what it said before it died still counts */
            if (more && fds[1].revents & (POLLIN | POLLHUP | POLLERR)) {
                if (!fill(&in, conn)) { close(conn); conn = -1; out.at = out.end; }
                else if (told < sizeof MAGIC && (told += in.end - in.at) >= sizeof MAGIC) owed = 1;
            }
        }
        if (fds[0].revents && !owed && !(conn >= 0 && fds[1].revents & POLLHUP)) {
            int fd = accept4(listener, NULL, NULL, SOCK_CLOEXEC | SOCK_NONBLOCK);
            if (fd >= 0) { if (conn >= 0) close(conn); conn = fd; told = 0; out.at = out.end; }
        }
    }
    while (waitpid(pid, &status, 0) < 0 && errno == EINTR) {}
    return WIFEXITED(status) ? WEXITSTATUS(status) : 128 + WTERMSIG(status);
}
