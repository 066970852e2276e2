// Work for all threads. Each takes a run of neighbouring pieces in rising order, so that a matrix in memory is read in as many
// streams as there are threads; whoever is done helps the others from their far end.
#pragma once
#include <omp.h>

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <vector>

// A function that lives as long as the call it is handed to.
template <class F> class Ref;
template <class R, class... A>
class Ref<R(A...)> {
    const void* what;
    R (*how)(const void*, A...);

   public:
    template <class F> Ref(const F& f) : what(&f), how([](const void* what, A... a) -> R { return (*(const F*)what)(a...); }) {}
    R operator()(A... a) const { return how(what, a...); }
};

namespace {

// Scratch of a thread: 64-byte aligned, grown and never given back. Each file has its own.
template <class T>
T* scratch(int which, long count) {
    static thread_local std::vector<float> hold[5];
    size_t need = count * sizeof(T) / 4 + 32;
    if (hold[which].size() < need) hold[which].resize(need);
    return (T*)((uintptr_t(hold[which].data()) + 63) & ~uintptr_t(63));
}

}  // namespace

// How many pieces to make where `most` would do: enough for whoever is slow to be helped.
inline long pieces_of(long most) { return std::max<long>(1, std::min<long>(most, 8 * omp_get_max_threads())); }

inline void share(long pieces, bool worth, Ref<void(long)> work) {
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
