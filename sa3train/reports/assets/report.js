const takes = [...document.querySelectorAll('.take')].filter(take => take.querySelector('audio'));
let last = null;
for (const take of takes) {
  const audio = take.querySelector('audio'), picture = take.querySelector('.picture');
  const head = picture && picture.querySelector('.playhead');
  audio.addEventListener('play', () => {
    const other = last && last !== audio && last.closest('.take');
    if (other && !last.paused) {
      if (other.dataset.group === take.dataset.group) audio.currentTime = last.currentTime;
      last.pause();
    }
    last = audio; take.classList.add('playing');
    const follow = () => {
      if (head) head.style.left = 100 * audio.currentTime / (audio.duration || 1) + '%';
      if (!audio.paused) requestAnimationFrame(follow);
    };
    follow();
  });
  if (picture) picture.addEventListener('click', event => {
    const box = picture.getBoundingClientRect();
    audio.currentTime = (event.clientX - box.left) / box.width * (audio.duration || 0); audio.play();
  });
}
