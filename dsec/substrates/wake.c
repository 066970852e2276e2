/* Run in a machine that was just cloned from a memory image: a clone has its template's clock and its template's random
 * generator, so two clones would draw the same keys. The host gives the time and 64 fresh random bytes on standard input.
 *
 *   wake    int64 nanoseconds since 1970 (little-endian), then 64 bytes of entropy */
#include <fcntl.h>
#include <linux/random.h>
#include <stdint.h>
#include <stdio.h>
#include <string.h>
#include <sys/ioctl.h>
#include <time.h>
#include <unistd.h>

int main(void) {
    struct { int64_t time; unsigned char entropy[64]; } given;
    size_t got = 0;
    for (ssize_t n; got < sizeof given && (n = read(0, (char *)&given + got, sizeof given - got)) > 0;) got += n;
    if (got != sizeof given) { fprintf(stderr, "wake: %zu of %zu bytes\n", got, sizeof given); return 1; }
    struct timespec now = {given.time / 1000000000, given.time % 1000000000};
    if (clock_settime(CLOCK_REALTIME, &now)) { perror("wake: clock"); return 1; }
    struct { struct rand_pool_info info; unsigned char bytes[64]; } pool = {{512, 64}, {0}};
    memcpy(pool.info.buf, given.entropy, 64);
    int fd = open("/dev/urandom", O_WRONLY | O_CLOEXEC);
    /* credit the bytes, then make the generator draw its key again at once instead of within the minute */
    if (fd < 0 || ioctl(fd, RNDADDENTROPY, &pool) || ioctl(fd, RNDRESEEDCRNG)) { perror("wake: entropy"); return 1; }
    return 0;
}
