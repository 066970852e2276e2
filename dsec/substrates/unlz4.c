/* Unpacks LZ4's legacy format, in which Debian packs its kernels: standard input to standard output.
 *
 * A magic number, then blocks: 32 bits of packed size, and sequences of a token, literal bytes, a 16-bit distance and a
 * length (LZ4 block format). A block holds at most 8 MiB. What follows the last whole block is ignored: kernels append
 * their size. Exit code 1 and one line if the input is something else or damaged. */
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { MAGIC = 0x184C2102, BLOCK = 8 << 20 };
static unsigned char packed[BLOCK + BLOCK / 255 + 16], plain[BLOCK];

static void bad(const char *why) { fprintf(stderr, "unlz4: %s\n", why); exit(1); }

static size_t longer(size_t n, const unsigned char **at, const unsigned char *end) { /* 15 or more goes on in bytes */
    unsigned char more = 255;
    for (; more == 255; n += more) {
        if (*at == end) bad("a length runs out of its block");
        more = *(*at)++;
    }
    return n;
}

static size_t unpack(size_t size) {
    const unsigned char *at = packed, *end = packed + size;
    size_t n = 0;
    while (at < end) {
        unsigned char token = *at++;
        size_t count = token >> 4 == 15 ? longer(15, &at, end) : token >> 4;
        if (count > (size_t)(end - at) || count > BLOCK - n) bad("literals run out of their block");
        memcpy(plain + n, at, count);
        at += count, n += count;
        if (at == end) break; /* the last sequence has no match */
        if (end - at < 2) bad("a distance runs out of its block");
        size_t distance = at[0] | at[1] << 8;
        at += 2;
        count = ((token & 15) == 15 ? longer(15, &at, end) : (size_t)(token & 15)) + 4;
        if (!distance || distance > n || count > BLOCK - n) bad("a match lies outside its block");
        for (; count; count--, n++) plain[n] = plain[n - distance];
    }
    return n;
}

int main(void) {
    uint32_t word; /* little-endian machines only */
    if (fread(&word, 4, 1, stdin) != 1 || word != MAGIC) bad("not LZ4's legacy format");
    for (int blocks = 0; fread(&word, 4, 1, stdin) == 1; blocks++) {
        if (word == MAGIC) continue;
        if (word > sizeof packed || fread(packed, 1, word, stdin) != word) {
            if (!blocks) bad("cut off");
            break;
        }
        size_t n = unpack(word);
        if (fwrite(plain, 1, n, stdout) != n) bad("cannot write");
    }
    return fflush(stdout) ? 1 : 0;
}
