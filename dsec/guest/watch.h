/* What changes below a folder, told on standard output until somebody ends it: a letter, a blank, the name relative to the
 * folder, a NUL. c created or moved here, d deleted, m moved away, w written, a attributes. Runs where a command would be
 * executed, as the command's user; `deep` watches folders below as well, also those that are made later (what is made in
 * one before it is watched is told as created). Exit 75: the kernel dropped events; 0: the folder is gone. */
#include <limits.h>
#include <sys/inotify.h>

enum { SEEN = IN_CREATE | IN_MOVED_TO | IN_DELETE | IN_MOVED_FROM | IN_MODIFY | IN_ATTRIB };
static struct buf watched; /* the folder's name by watch: int wd, name, NUL */
static char watched_at[PATH_MAX]; /* the whole path of the first; standing in it would keep it from being gone */

static const char *watched_name(int wd) {
    for (char *at = watched.p; at < watched.p + watched.n; at += sizeof wd + strlen(at + sizeof wd) + 1)
        if (!memcmp(at, &wd, sizeof wd)) return at + sizeof wd;
    return NULL;
}

static void watch_tell(char kind, const char *folder, const char *name) {
    char text[2 * PATH_MAX];
    int n = snprintf(text, sizeof text, "%c %s%s%s", kind, folder, *folder && *name ? "/" : "", name) + 1;
    if (n > (int)sizeof text) n = sizeof text;
    for (int at = 0, got; at < n; at += got) if ((got = write(1, text + at, n - at)) < 0) _exit(1);
}

static int watch_add(int in, const char *name, int deep, int tell) { /* 0, or -1 with errno */
    char at[2 * PATH_MAX];
    snprintf(at, sizeof at, "%s/%s", watched_at, name);
    int wd = inotify_add_watch(in, at, SEEN | IN_ONLYDIR | (*name ? IN_DONT_FOLLOW : IN_DELETE_SELF));
    if (wd < 0) return -1;
    if (!watched_name(wd)) { put(&watched, &wd, sizeof wd); put(&watched, name, strlen(name) + 1); }
    DIR *folder = deep || tell ? opendir(at) : NULL;
    if (!folder) return 0;
    for (struct dirent *e; (e = readdir(folder));) {
        if (!strcmp(e->d_name, ".") || !strcmp(e->d_name, "..")) continue;
        char path[PATH_MAX];
        snprintf(path, sizeof path, "%s%s%s", name, *name ? "/" : "", e->d_name);
        if (tell) watch_tell('c', name, e->d_name);
        if (deep && watch_add(in, path, deep, tell) && errno != ENOTDIR && errno != ENOENT && errno != ELOOP && errno != EACCES) {
            closedir(folder);
            return -1;
        }
    }
    closedir(folder);
    return 0;
}

static int watch(int deep) { /* what it stands in; returns errno when it cannot begin, else not at all */
    _Alignas(struct inotify_event) char data[1 << 16];
    int in = inotify_init1(IN_CLOEXEC);
    if (in < 0 || !getcwd(watched_at, sizeof watched_at) || chdir("/") || watch_add(in, "", deep, 0) || dup2(in, 0) < 0) return errno;
    syscall(SYS_close_range, 3, ~0U, 0); /* whoever waits for the start sees it, and nothing of the agent's stays open */
    for (ssize_t n; (n = read(0, data, sizeof data)) > 0;) {
        struct inotify_event *last = NULL;
        for (char *at = data; at < data + n; at += sizeof *last + last->len) {
            struct inotify_event *e = (void *)at;
            const char *folder = watched_name(e->wd), *name = e->len ? e->name : "";
            int same = last && last->wd == e->wd && last->mask == e->mask && !strcmp(last->len ? last->name : "", name);
            last = e;
            if (e->mask & IN_Q_OVERFLOW) _exit(75);
            if (e->mask & IN_DELETE_SELF) _exit(0);
            if (!folder || same || !(e->mask & SEEN) || (!*name && *folder)) continue; /* the last: its parent's watch says it */
            watch_tell(e->mask & (IN_CREATE | IN_MOVED_TO) ? 'c' : e->mask & IN_DELETE ? 'd' : e->mask & IN_MOVED_FROM ? 'm' :
                       e->mask & IN_MODIFY ? 'w' : 'a', folder, name);
            if (deep && e->mask & IN_ISDIR && e->mask & (IN_CREATE | IN_MOVED_TO)) {
                char path[PATH_MAX];
                snprintf(path, sizeof path, "%s%s%s", folder, *folder ? "/" : "", name);
                if (watch_add(0, path, 1, 1) && errno == ENOSPC) _exit(75);
            }
        }
    }
    _exit(1);
}
