/* Byte streams between the host and TCP sockets on the sandbox's own loopback, many on the agent's one connection; part of
 * agent.c. Outwards (N): a port on which programs inside find the host's proxy. Inwards (T): the host reaches a port that
 * a program inside listens on. Neither side sends more than WINDOW bytes of a stream before the other has said that it
 * passed them on, so a slow reader holds up its own stream and no memory. */
#include <netinet/in.h>

enum { WINDOW = 1 << 18, STREAMS = 128 };
struct stream { struct stream *next; uint32_t id; int fd, port, connecting, ended_in, ended_out, dead; size_t credit; struct buf out; };

static struct stream *streams;
static int gate = -1, stream_count;
static uint32_t opened;

static struct stream *stream_new(uint32_t id, int fd, int port) {
    struct stream *s = calloc(1, sizeof *s);
    if (!s) die("memory");
    *s = (struct stream){.next = streams, .id = id, .fd = fd, .port = port, .credit = WINDOW};
    stream_count++;
    return streams = s;
}

static void stream_drop(struct stream *s, int tell) {
    if (s->dead) return;
    s->dead = 1;
    if (s->fd >= 0) close(s->fd);
    s->fd = -1;
    if (tell) reply('c', s->id, NULL, 0);
}

static void stream_sweep(void) {
    for (struct stream **at = &streams, *s; (s = *at);)
        if (s->dead) { *at = s->next; free(s->out.p); free(s); stream_count--; } else at = &s->next;
}

static void stream_settle(struct stream *s) { /* both directions at their end: both sides know, nothing is sent */
    if (s->ended_out && !s->out.n && !s->dead) {
        shutdown(s->fd, SHUT_WR);
        if (s->ended_in) stream_drop(s, 0);
    }
}

static void stream_flush(struct stream *s) {
    uint32_t passed = 0;
    while (s->out.n && !s->connecting) {
        ssize_t n = send(s->fd, s->out.p, s->out.n, MSG_NOSIGNAL);
        if (n < 0 && (errno == EAGAIN || errno == EINTR)) break;
        if (n < 0) { stream_drop(s, 1); return; }
        cut(&s->out, n);
        passed += n;
    }
    if (passed) reply('a', s->id, &passed, 4);
    stream_settle(s);
}

static void stream_connect(struct stream *s, int family) {
    struct sockaddr_in v4 = {.sin_family = AF_INET, .sin_port = htons(s->port), .sin_addr.s_addr = htonl(INADDR_LOOPBACK)};
    struct sockaddr_in6 v6 = {.sin6_family = AF_INET6, .sin6_port = htons(s->port), .sin6_addr = IN6ADDR_LOOPBACK_INIT};
    if (s->fd >= 0) close(s->fd);
    s->connecting = family;
    if ((s->fd = socket(family, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0)) >= 0 &&
        (!connect(s->fd, family == AF_INET ? (void *)&v4 : (void *)&v6, family == AF_INET ? sizeof v4 : sizeof v6) || errno == EINPROGRESS))
        return; /* the poll says how it went */
    int why = errno;
    if (family == AF_INET) { stream_connect(s, AF_INET6); return; }
    refuse(s->id, why, "port");
    stream_drop(s, 0);
}

static void stream_connected(struct stream *s) {
    int why = 0;
    socklen_t size = sizeof why;
    getsockopt(s->fd, SOL_SOCKET, SO_ERROR, &why, &size);
    if (why && s->connecting == AF_INET) stream_connect(s, AF_INET6);
    else if (why) { refuse(s->id, why, "port"); stream_drop(s, 0); }
    else { s->connecting = 0; reply('A', s->id, NULL, 0); stream_flush(s); }
}

static void stream_pull(struct stream *s) {
    char data[PIECE];
    ssize_t n = recv(s->fd, data, s->credit < sizeof data ? s->credit : sizeof data, 0);
    if (n < 0 && (errno == EAGAIN || errno == EINTR)) return;
    if (n < 0) { stream_drop(s, 1); return; }
    if (n) { s->credit -= n; reply('t', s->id, data, n); return; }
    s->ended_in = 1;
    reply('e', s->id, NULL, 0);
    stream_settle(s);
}

static size_t stream_polls(struct pollfd *fds) { /* the gate, then each stream, in the order of the list */
    size_t n = 0;
    fds[n++] = (struct pollfd){conn >= 0 && stream_count < STREAMS ? gate : -1, POLLIN, 0};
    for (struct stream *s = streams; s; s = s->next) {
        short want = s->connecting ? POLLOUT : (s->out.n ? POLLOUT : 0) | (!s->ended_in && s->credit && out.n < BUSY ? POLLIN : 0);
        fds[n++] = (struct pollfd){want ? s->fd : -1, want, 0}; /* asked for nothing, poll would still tell of hang-ups */
    }
    return n;
}

static void stream_serve(struct pollfd *fds) {
    struct pollfd *door = fds++;
    for (struct stream *s = streams; s; s = s->next, fds++) {
        if (!fds->revents || s->dead) continue;
        if (s->connecting) { stream_connected(s); continue; }
        if (fds->revents & POLLOUT) stream_flush(s);
        if (!s->dead && fds->events & POLLIN && fds->revents & (POLLIN | POLLHUP | POLLERR)) stream_pull(s);
    }
    int fd = door->revents ? accept4(gate, NULL, NULL, SOCK_CLOEXEC | SOCK_NONBLOCK) : -1;
    if (fd >= 0) reply('o', stream_new(1u << 31 | ++opened, fd, 0)->id, NULL, 0);
}

static void stream_gate(uint32_t id, int port) { /* opens the port of the proxy; a second time is fine */
    struct sockaddr_in here = {.sin_family = AF_INET, .sin_port = htons(port), .sin_addr.s_addr = htonl(INADDR_LOOPBACK)};
    int yes = 1;
    if (gate < 0) {
        gate = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0);
        setsockopt(gate, SOL_SOCKET, SO_REUSEADDR, &yes, sizeof yes);
        if (gate < 0 || bind(gate, (void *)&here, sizeof here) || listen(gate, 64)) {
            refuse(id, errno, "proxy port");
            if (gate >= 0) close(gate);
            gate = -1;
            return;
        }
    }
    reply('A', id, NULL, 0);
}

static int stream_take(char kind, uint32_t id, char *data, size_t n) { /* frames of a stream that is gone mean nothing */
    struct stream *s = streams;
    int port = n && !data[n - 1] && (kind == 'N' || kind == 'T') ? atoi(data) : 0;
    if ((kind == 'N' || kind == 'T') && (port < 1 || port > 65535)) return 0;
    if (kind == 'N') { stream_gate(id, port); return 1; }
    if (kind == 'T') { stream_connect(stream_new(id, -1, port), AF_INET); return 1; }
    while (s && (s->id != id || s->dead)) s = s->next;
    if (!s) return 1;
    if (kind == 't' && n <= WINDOW && s->out.n + n <= WINDOW && !s->ended_out) { put(&s->out, data, n); stream_flush(s); }
    else if (kind == 'e') { s->ended_out = 1; if (!s->connecting) stream_settle(s); }
    else if (kind == 'a' && n == 4) { uint32_t more; memcpy(&more, data, 4); s->credit += more; }
    else stream_drop(s, 0); /* 'c', or more than the window */
    return 1;
}

static void stream_hang_up(void) {
    for (struct stream *s = streams; s; s = s->next) stream_drop(s, 0);
}
