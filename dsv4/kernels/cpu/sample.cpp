// The choice of a token. Everything in double and in the order of `reference.sample`, but only as much is sorted as top-p needs.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <vector>

namespace {

struct Token { double odds; int64_t id; };

int64_t drawn(const float* logits, long V, double temperature, double top_p, double draw) {
    const long best = std::max_element(logits, logits + V) - logits;  // the first of equals
    if (temperature == 0) return best;
    std::vector<Token> tokens(V);
    double total = 0;
    for (long i = 0; i < V; i++) {
        tokens[i] = {std::exp((double(logits[i]) - logits[best]) / temperature), i};
        total += tokens[i].odds;
    }
    for (Token& t : tokens) t.odds /= total;
    long kept = V;
    if (top_p < 1) {
        // What is below this weighs less than 1 - top_p together: it is never reached.
        const double least = 0.5 * (1 - top_p) / V;
        tokens.erase(std::remove_if(tokens.begin(), tokens.end(), [=](const Token& t) { return t.odds < least; }), tokens.end());
        auto before = [](const Token& a, const Token& b) { return a.odds != b.odds ? a.odds > b.odds : a.id < b.id; };
        const long some = tokens.size();
        long sorted = 0;
        kept = 0;
        for (double mass = 0; kept < some && mass < top_p; kept++) {
            if (kept == sorted) {  // the next most probable ones: more and more at a time
                long next = std::min(some, std::max(64L, 8 * sorted));
                if (next < some) std::nth_element(tokens.begin() + sorted, tokens.begin() + next, tokens.end(), before);
                std::sort(tokens.begin() + sorted, tokens.begin() + next, before);
                sorted = next;
            }
            mass += tokens[kept].odds;
        }
    }
    for (long i = 1; i < kept; i++) tokens[i].odds += tokens[i - 1].odds;  // the mass up to and with each
    const double aim = draw * tokens[kept - 1].odds;
    auto beyond = [](double aim, const Token& t) { return aim < t.odds; };
    auto found = std::upper_bound(tokens.begin(), tokens.begin() + kept, aim, beyond);
    return found == tokens.begin() + kept ? tokens[kept - 1].id : found->id;
}

}  // namespace

extern "C" void sample(const float* logits, const double* temperature, const double* top_p, const double* draw, int64_t* out, long B, long V) {
#pragma omp parallel for if (B > 1)
    for (long b = 0; b < B; b++) out[b] = drawn(logits + b * V, V, temperature[b], top_p[b], draw[b]);
}
