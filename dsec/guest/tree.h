/* All that a command started: what descends from it, its session, and orphans (they are ours) younger than it that are no
 * other command; part of agent.c. An orphan of another command that runs beside it cannot be told apart, and goes too. */

enum { PROCESSES = 4096, ROUNDS = 40 };

static int doomed(struct proc *p) { /* SIGKILL to each -> how many */
    static struct { int pid, parent, session, dead, hit; unsigned long long start; } all[PROCESSES];
    int count = 0, hits = 0, found = 1;
    DIR *dir = opendir("/proc");
    for (struct dirent *e; dir && count < PROCESSES && (e = readdir(dir));) {
        char path[64], text[1024], state, *rest;
        int pid = atoi(e->d_name), fd, n;
        if (pid <= 0) continue;
        snprintf(path, sizeof path, "/proc/%d/stat", pid);
        if ((fd = open(path, O_RDONLY | O_CLOEXEC)) < 0) continue;
        n = read(fd, text, sizeof text - 1);
        close(fd);
        text[n > 0 ? n : 0] = 0;
        if (!(rest = strrchr(text, ')'))) continue; /* a name may hold anything, but nothing behind it does */
        all[count].pid = pid, all[count].hit = 0;
        if (sscanf(rest + 1, " %c %d %*d %d %*s %*s %*s %*s %*s %*s %*s %*s %*s %*s %*s %*s %*s %*s %*s %llu", &state,
                   &all[count].parent, &all[count].session, &all[count].start) == 4)
            all[count++].dead = state == 'Z' || state == 'X';
    }
    if (dir) closedir(dir);
    for (int i = 0; i < count; i++) {
        int known = all[i].pid == getpid();
        for (struct proc *q = procs; q; q = q->next) known = known || (q->pid == all[i].pid && !q->exited && q != p);
        if (known) all[i].dead = 1;
        else all[i].hit = all[i].pid == p->pid || all[i].session == p->pid || (all[i].parent == getpid() && all[i].start >= p->ticks);
    }
    while (found) {
        found = 0;
        for (int i = 0; i < count; i++)
            for (int k = 0; k < count && !all[i].hit; k++)
                if (all[k].hit && all[i].parent == all[k].pid) all[i].hit = found = 1;
    }
    for (int i = 0; i < count; i++)
        if (all[i].hit && !all[i].dead && !kill(all[i].pid, SIGKILL)) hits++;
    return hits;
}

static void kill_tree(struct proc *p) {
    for (int k = 0; k < ROUNDS; k++) { /* each round meets what was forked during the one before */
        if (!doomed(p)) return;
        usleep(2000);
    }
    kill(-1, SIGKILL); /* it forks faster than it can be told from the others */
}
