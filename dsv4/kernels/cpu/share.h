// Work for all threads. Each takes a run of neighbouring pieces in rising order, so that a matrix in memory is read in as many
// streams as there are threads; whoever is done helps the others from their far end.
#pragma once
#include <omp.h>

#include <algorithm>
#include <atomic>
#include <vector>

// How many pieces to make where `most` would do: enough for whoever is slow to be helped.
inline long pieces_of(long most) { return std::max<long>(1, std::min<long>(most, 8 * omp_get_max_threads())); }

template <class F>
inline void share(long pieces, bool worth, F work) {
    if (!worth || pieces < 2) {
        for (long i = 0; i < pieces; i++) work(i);
        return;
    }
    std::vector<std::atomic<bool>> taken(pieces);
#pragma omp parallel
    {
        const long me = omp_get_thread_num(), all = omp_get_num_threads();
        for (long i = pieces * me / all; i < pieces * (me + 1) / all; i++)
            if (!taken[i].exchange(true)) work(i);
        for (long other = 1; other < all; other++) {
            const long they = (me + other) % all;
            for (long i = pieces * (they + 1) / all - 1; i >= pieces * they / all; i--)
                if (!taken[i].exchange(true)) work(i);
        }
    }
}
